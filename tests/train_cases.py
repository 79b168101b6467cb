"""Several runs of train.py in one launch, one after the other; also under torchrun.

    python -m tests.train_cases RUNS.json      (a list of runs, each a list of overrides)

The first run that does not finish ends the launch.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

import train
from nmm import parallel
from nmm.config import compose, load, run_directory
from nmm.stop import Stops
from tests.runs import environment


def launch(runs: list[list[str]], *, directory: Path, processes: int = 1) -> None:
    """Run them all; `directory` is for the list."""
    path = directory / "runs.json"
    path.write_text(json.dumps(runs))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, "-m", "tests.train_cases", str(path)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    torch.set_num_threads(1)
    world = parallel.start()
    for words in json.loads(Path(sys.argv[1]).read_text()):
        settings = load(compose(words))
        stops = Stops(run_directory(settings.run), max_minutes=None, world=world)
        assert train.run_in(world, settings, overrides=words, stops=stops)
    parallel.stop()


if __name__ == "__main__":
    main()
