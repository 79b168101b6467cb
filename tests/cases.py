"""Cases that several processes compute, in one launch for all of them, and what they found."""

import json
import subprocess
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from nmm.parallel import World
from tests.forked import together
from tests.runs import environment


class Run(Protocol):
    """Computes one case; the main process leaves directory/NAME.json."""

    def __call__(self, case: dict, *, directory: Path, world: World) -> None: ...


def launch(module: str, cases: list[dict], *, directory: Path) -> None:
    """Compute all cases, each under a `name` of its own, in a process of that module."""
    assert len({case["name"] for case in cases}) == len(cases)
    (directory / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", module, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def result_of(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / f"{name}.json").read_text())


def compute(run: Run) -> None:
    """What the module does: cases with a `source` after those that they begin from."""
    directory = Path(sys.argv[1])
    cases = json.loads((directory / "cases.json").read_text())

    def order(case: dict) -> tuple[bool, int]:
        return bool(case["source"]), case["processes"]

    for (_, processes), these in groupby(sorted(cases, key=order), key=order):
        together(partial(_run_all, run, list(these), directory), processes=processes)


def _run_all(run: Run, cases: list[dict], directory: Path, world: World) -> None:
    torch.set_num_threads(1)
    for case in cases:
        run(case, directory=directory, world=world)
