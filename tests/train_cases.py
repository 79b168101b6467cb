"""Several runs of train.py in one launch, one after the other, with any numbers of processes.

    python -m tests.train_cases RUNS.json    (a list of [processes, runs]; a run is its overrides)

The first run that does not finish ends the launch.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import train
from nmm.config import compose, load, run_directory
from nmm.parallel import World
from nmm.stop import Stops
from tests.forked import together
from tests.runs import environment

Runs = list[list[str]]


def launch(runs: Runs, *, directory: Path, processes: int = 1) -> str:
    """Run them all and return what they said; `directory` is for the list."""
    return launch_in_turn([(processes, runs)], directory=directory)


def launch_in_turn(groups: list[tuple[int, Runs]], *, directory: Path) -> str:
    """The same for runs with several numbers of processes."""
    path = directory / "runs.json"
    path.write_text(json.dumps(groups))
    done = subprocess.run(
        [sys.executable, "-m", "tests.train_cases", str(path)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_all(world: World, *, runs: Runs) -> None:
    torch.set_num_threads(1)
    for words in runs:
        settings = load(compose(words))
        stops = Stops(run_directory(settings.run), max_minutes=None, world=world)
        assert train.run_in(world, settings, overrides=words, stops=stops)
    sys.stdout.flush()


def main() -> None:
    for processes, runs in json.loads(Path(sys.argv[1]).read_text()):
        together(partial(run_all, runs=runs), processes=processes)


if __name__ == "__main__":
    main()
