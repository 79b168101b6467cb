"""From the finished runs of a study to its table, its laws and its report."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.study.plan import StudyRun
from launch.study.state import Folder, Standing, State
from launch.torchrun import ROOT
from nmm.config import StudyConfig
from nmm.scaling.files import csv_text
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.runs import Run, read_run

TABLE = "runs.csv"


def write_results(
    study: StudyConfig,
    runs: Sequence[StudyRun],
    standings: Mapping[str, Standing],
    *,
    folder: Folder,
) -> None:
    """runs.csv, points/GROUP/, fits/GROUP/ and report/, from what is finished.

    A group needs more models than its law has parameters.
    """
    folder.write(TABLE, csv_text([_row(run, standings[run.name], folder) for run in runs]))
    print(f"wrote {folder.notes / TABLE}", flush=True)
    groups = _groups(runs, standings)
    needed = len(CHINCHILLA.names) + 1
    few = {name: len(points) for name, points in groups.items() if len(points) < needed}
    for name, count in few.items():
        print(f"no law for {name}: {count} models, and at least {needed} are needed", flush=True)
    fits = []
    for name, points in groups.items():
        if name not in few:
            link_points(points, folder.notes / "points" / name, runs=folder.runs)
            fits += _fit(name, folder=folder, resamples=study.bootstrap)
    if fits:
        command("report", "--fit", *fits, "--out", str(folder.notes / "report"))


def _groups(
    runs: Sequence[StudyRun], standings: Mapping[str, Standing]
) -> dict[str, list[StudyRun]]:
    """The finished models of every family and mixture."""
    found: dict[str, list[StudyRun]] = {}
    for run in runs:
        if run.is_point:
            points = found.setdefault(run.cell.group, [])
            if standings[run.name].state is State.finished:
                points.append(run)
    return found


def link_points(points: Sequence[StudyRun], directory: Path, *, runs: Path) -> None:
    """A folder of links to exactly these runs, for `python -m nmm.scaling fit --runs`."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.iterdir():
        stale.unlink()
    for run in points:
        target = os.path.relpath(runs / run.name, directory)
        (directory / run.name).symlink_to(target, target_is_directory=True)


def _fit(name: str, *, folder: Folder, resamples: int) -> list[str]:
    """NAME=DIR of the fit; nothing where it was refused, which is said."""
    out = folder.notes / "fits" / name
    done = command(
        *("fit", "--runs", str(folder.notes / "points" / name)),
        *("--bootstrap", str(resamples), "--out", str(out)),
    )
    return [f"{name}={out}"] if done else []


def command(*words: str) -> bool:
    """Run a command of nmm.scaling, which anybody can repeat; False when it was refused."""
    print(f"$ python -m nmm.scaling {' '.join(words)}", flush=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    program = [sys.executable, "-m", "nmm.scaling", *words]
    return subprocess.run(program, env=environment).returncode == 0


def _row(run: StudyRun, standing: Standing, folder: Folder) -> dict[str, object]:
    """What is known of a run; tokens, FLOPs and losses as measured."""
    cell = run.cell
    row: dict[str, object] = {
        "run": run.name,
        "role": run.role.value,
        "state": standing.state.value,
        "note": standing.note,
        "family": cell.family,
        "size": cell.size,
        "mixture": cell.mixture,
        "seed": cell.seed,
        "trunk": run.trunk or "",
        "first_step": run.first_step,
        "steps": run.phases.total_steps,
        "N": cell.parameters.N,
        "N_active": cell.parameters.N_active,
        "N_vision": cell.parameters.N_vision,
    }
    if not run.is_point or standing.state is not State.finished:
        return row
    found = read_run(folder.run(run.name))
    assert isinstance(found, Run), found
    measured = {"tokens": found.tokens, "flops": found.flops, **found.losses}
    return {**row, **measured, "commit": found.manifest["starts"][-1]["git_commit"]}
