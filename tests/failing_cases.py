"""Processes that fail, die or hang, all cases at once; tests/test_fault.py starts it.

    python -m tests.failing_cases DIR

DIR/words.json has the overrides of the run `trained`, of two processes, which somebody else will
disturb. One process imports everything and is copied for all, so that they begin together.
DIR/CASE.log is what the processes of a case printed, DIR/codes.json what they ended with, but for
those that stand still until all others have ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

import train
from nmm import fault, parallel
from nmm.config import compose, load
from nmm.errors import UserError
from nmm.heartbeat import Phase
from nmm.parallel import World
from tests.ports import free_ports

PROCESSES = {
    **{"alone": 1, "behind": 2, "slow": 2, "stopped": 2, "late": 2},  # they wait, as in NCCL
    **{"refused": 2, "bug": 2, "killed": 2},  # they leave at once
    "trained": 2,
}
STAND_STILL = [("stopped", 1), ("trained", 1)]
TIMEOUT_MINUTES = 0.05
WAITS_SECONDS = 600  # for ever


def where() -> str:
    return "after step 7"


def wait(case: str, *, world: World, directory: Path) -> None:
    """As in a collective of NCCL, which never comes back, or on a disk that is gone."""
    with fault.watched(
        directory, timeout_minutes=TIMEOUT_MINUTES, world=world, where=where
    ) as heart:
        heart.enter(Phase.data, step=8)
        if world.rank == 1 and case == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if world.rank == 1 and case == "late":
            time.sleep(4)
        if world.rank == 1 and case == "slow":
            fault._is_first = is_first_slowly
        if world.rank == 0:
            heart.hold([["a"], ["b"]])
            heart.enter(Phase.backward, 1)
        if case == "late":
            heart.enter(Phase.optimizer)
            parallel.barrier()
        time.sleep(WAITS_SECONDS)


def is_first_slowly(world: World) -> bool:
    time.sleep(2)
    return world.store.add("nmm/fault", 1) == 1


def leave(case: str, *, world: World) -> None:
    """Process 1 does; the other meets it no more."""
    if world.rank == 1 and case == "refused":
        raise UserError("data.x is 1; set it to 2.")
    if world.rank == 1 and case == "bug":
        raise KeyError("a bug")
    if world.rank == 1 and case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    parallel.barrier()


def fail(case: str, *, directory: Path) -> None:
    if case == "trained":
        words = json.loads((directory / "words.json").read_text())
        train.run(load(compose(words)), overrides=words)
        return
    leaves = case in ("refused", "bug", "killed")
    if case == "behind" and os.environ["RANK"] == "1":
        time.sleep(90 * TIMEOUT_MINUTES)  # who comes late to the meeting is waited for
    world = parallel.start(timeout_minutes=1 if leaves else TIMEOUT_MINUTES)
    with fault.ending_together(world, directory / case, where=where):
        if leaves:
            leave(case, world=world)
        wait(case, world=world, directory=directory / case)


def begin(case: str, *, rank: int, port: int, directory: Path) -> int:
    """The process; itself it ends as any interpreter does."""
    child = os.fork()
    return child or become(case, rank=rank, port=port, directory=directory)


def become(case: str, *, rank: int, port: int, directory: Path) -> NoReturn:
    log = os.open(directory / f"{case}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES[case]}
    os.environ |= {key: str(value) for key, value in (meeting | {"MASTER_PORT": port}).items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    fail(case, directory=directory)
    sys.exit(f"{case} has ended")


def main() -> None:
    directory, running = Path(sys.argv[1]), {}
    for (case, processes), port in zip(PROCESSES.items(), free_ports(len(PROCESSES)), strict=True):
        for rank in range(processes):
            running[begin(case, rank=rank, port=port, directory=directory)] = (case, rank)
    codes: dict[str, list[int]] = {case: [] for case in PROCESSES}
    for child, (case, rank) in running.items():
        if (case, rank) not in STAND_STILL:
            codes[case].append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    for child, who in running.items():
        if who in STAND_STILL:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    (directory / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
