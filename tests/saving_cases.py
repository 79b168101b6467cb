"""Runs of two processes whose checkpoints fail and are damaged; tests/test_checkpoint.py starts it.

    python -m tests.saving_cases DIR [SMALL]

SMALL is a disk of 4 MiB, on which the run `full` of one process finds room only after a while: at
first for nothing at all, then for no checkpoint.

`whole` is not disturbed. In `limited` process 1 may not write files of more than 100 KiB, so that
no checkpoint is ever complete; the same command without the limit begins anew. Then one byte of
the newest checkpoint is changed, in the file of process 1, and the same command goes on.
"""

import resource
import sys
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import torch

import train
from nmm import begin
from nmm.checkpoint import Progress, complete, step_of
from nmm.config import compose, load, run_directory
from nmm.heartbeat import Heartbeat
from nmm.parallel import World
from nmm.stop import Stops
from nmm.uploads import Uploads
from tests import runs
from tests.forked import together

LIMIT_BYTES = 100 * 2**10
SHORT = (
    *("schedule.total_steps=8", "schedule.warmup_steps=0", "checkpoint.every_steps=5"),
    *("evaluation.every_steps=0", "evaluation.at_start=false"),
    *("log.wandb=off", "data.workers=0", "engine=zero1", "engine.micro_batch=4"),
)


def overrides(directory: Path, name: str) -> list[str]:
    return runs.overrides(runs.corpus(), directory, f"run.name={name}", *SHORT)


def find_room(world: World, *, directory: Path) -> None:
    """No training, only saves after some of the steps; what is there after each is checked.

    Before that the disk has no room for anything. The one of step 5 is to be kept for good.
    """
    words = [*overrides(directory, "full"), "checkpoint.keep_last=1", "checkpoint.keep_steps=[5]"]
    asked = load(compose(words))
    fill(directory / "other")
    train_it(world, words=words, fits=False)
    (directory / "other").unlink()
    plan, progress = begin.make_plan(asked, world=world), Progress()
    plan.directory.mkdir(exist_ok=True)
    engine = train.build_engine(plan, begin.Beginning(progress), asked, world=world)
    with (
        closing(Heartbeat(plan.directory, rank=0)) as heartbeat,
        closing(train.open_log(plan, progress, asked, heartbeat=heartbeat, world=world)) as log,
    ):
        saves = train.saves(plan, engine, log, Uploads(None, log=log), asked, world=world)

        def saved(step: int) -> list[int]:
            progress.step = step
            saves.save_if_due(progress)
            return [step_of(path) for path in complete(plan.directory)]

        (directory / "other").write_bytes(bytes(11 * 2**18))
        assert saved(4) == saved(5) == saved(6) == []
        (directory / "other").unlink()
        assert saved(7) == [7]
        assert saved(8) == [7, 8]  # 7 was written in place of 5


def fill(path: Path) -> None:
    """A file that takes all the room there is."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(2**12)):
            pass


def train_it(world: World, *, words: list[str], limited: bool = False, fits: bool = True) -> None:
    """Does it finish? Only without a limit, and where it fits."""
    torch.set_num_threads(1)
    if limited and world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, resource.RLIM_INFINITY))
    settings = load(compose(words))
    stops = Stops(run_directory(settings.run), max_minutes=None, world=world)
    try:
        finished = train.run_in(world, settings, overrides=words, stops=stops)
    except SystemExit as left:
        print(left, file=sys.stderr, flush=True)
        finished = False
    sys.stdout.flush()
    assert finished is (fits and not limited)


def main() -> None:
    directory = Path(sys.argv[1])
    for small in sys.argv[2:]:
        together(partial(find_room, directory=Path(small)), processes=1)
    whole, mine = overrides(directory, "whole"), overrides(directory, "limited")
    together(partial(train_it, words=whole), processes=2)
    together(partial(train_it, words=mine, limited=True), processes=2)
    together(partial(train_it, words=mine), processes=2)
    path = directory / "limited" / "checkpoints" / "step_00000008" / "states_00001.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    together(partial(train_it, words=mine), processes=2)


if __name__ == "__main__":
    main()
