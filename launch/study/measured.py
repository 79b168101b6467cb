"""What questions need beside losses of runs: experts' scores, losses across modalities; where fits
are.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.study.state import Folder
from launch.torchrun import ROOT

SCORES = "specialisation.csv"  # that nmm.evaluate --experts leaves in a run
ALL_KINDS = "all"


def fits_of(folder: Folder) -> Path:
    """A folder of fits for every family and mixture."""
    return folder.notes / "fits"


def pair_of(folder: Folder, *, family: str, pair: str) -> Path:
    """Where the law of a pair is written."""
    return fits_of(folder) / f"{family}-pair-{pair}"


def module(*words: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command of ours, which anybody can repeat; `quiet` keeps what it prints."""
    print(f"$ python -m {' '.join(words)}", flush=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    program = [sys.executable, "-m", *words]
    return subprocess.run(
        program, env=environment, text=True, stdout=subprocess.PIPE if quiet else None
    )


def measure_experts(directory: Path) -> None:
    """Which experts take which tokens, where that is not known of the newest checkpoint."""
    if not _is_newer(directory / SCORES, directory):
        module("nmm.evaluate", "--run", str(directory), "--experts", quiet=True)


def experts_of(directory: Path) -> list[float] | None:
    """The specialisation of every layer; None where it was not measured."""
    path = directory / SCORES
    if not path.exists():
        return None
    with path.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["kind"] == ALL_KINDS]
    scores = [row["specialisation"] for row in sorted(rows, key=lambda row: int(row["layer"]))]
    return None if "" in scores else [float(score) for score in scores]


def measure_across(folder: Folder, name: str, *, others: Sequence[str]) -> None:
    """Held-out losses of a run on the sources of other runs."""
    for other in others:
        path = _across(folder, name, other)
        if not _is_newer(path, folder.run(name)):
            runs = ["--run", str(folder.run(name)), "--data-of", str(folder.run(other))]
            done = module("nmm.evaluate", *runs, "--json", quiet=True)
            if done.returncode == 0:
                folder.write(str(path.relative_to(folder.notes)), done.stdout)


def across_of(folder: Folder, name: str, *, source: str) -> float | None:
    """The loss of a run on a source that it was not trained on; None where it was not measured."""
    for path in sorted((folder.notes / "across").glob(f"{name}--*.json")):
        loss = json.loads(path.read_text()).get(f"loss/source/{source}")
        if loss is not None:
            return float(loss)
    return None


def _across(folder: Folder, name: str, other: str) -> Path:
    return folder.notes / "across" / f"{name}--{other}.json"


def _is_newer(path: Path, run: Path) -> bool:
    """Than the newest checkpoint of a run."""
    made = [one.stat().st_mtime for one in (run / "checkpoints").glob("step_*/COMPLETE")]
    return path.exists() and path.stat().st_mtime >= max(made, default=0.0)
