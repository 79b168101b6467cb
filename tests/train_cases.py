"""Several runs of train.py in one launch, one after the other, with any numbers of processes.

    python -m tests.train_cases RUNS.json    (a list of [processes, runs]; a run is its overrides)

The first run that does not finish ends the launch.
"""

import json
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import torch

import train
from nmm.config import compose, load, run_directory
from nmm.parallel import World
from nmm.stop import Stops
from tests import corpora, runs
from tests.forked import together
from tests.runs import environment

Runs = list[list[str]]


def launch(these: Runs, *, directory: Path, processes: int = 1) -> str:
    """Run them all and return what they said; `directory` is for the list."""
    return launch_in_turn([(processes, these)], directory=directory)


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


@cache
def two_undisturbed() -> Path:
    """The directory of a run with the overrides TWO on two processes that nobody stopped."""
    directory = Path(tempfile.mkdtemp(prefix="runs-of-two-", dir=corpora.scratch()))
    words = runs.overrides(runs.corpus(), directory, "run.name=two", *runs.TWO)
    launch([words], directory=directory, processes=2)
    return directory / "two"


def run_all(world: World, *, these: Runs) -> None:
    torch.set_num_threads(1)
    for words in these:
        settings = load(compose(words))
        stops = Stops(run_directory(settings.run), max_minutes=None, world=world)
        assert train.run_in(world, settings, overrides=words, stops=stops)
    sys.stdout.flush()


def main() -> None:
    for processes, these in json.loads(Path(sys.argv[1]).read_text()):
        together(partial(run_all, these=these), processes=processes)


if __name__ == "__main__":
    main()
