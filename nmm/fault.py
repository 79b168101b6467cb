"""One sentence for a run in which a process fails, dies or hangs, whichever it is; all exit with 1.

The sentence says what a process was doing, from the file of its heartbeat; faults.jsonl of the run
directory has the same in full.
"""

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import NoReturn

import torch.distributed as dist

from nmm import heartbeat
from nmm.errors import UserError
from nmm.heartbeat import Heartbeat, Phase
from nmm.log import Lines
from nmm.parallel import World, is_of_a_collective, reason
from nmm.rundir import wall_time

FILE = "faults.jsonl"
SECONDS_TO_ANSWER = 5.0  # a process whose collective failed answers the roll at once
SECONDS_BETWEEN_LOOKS = 1.0
# Of gloo, whose collectives fail at the limit and leave an error; NCCL's never come back.
GLOO_FIRST = 1.5
NAMED = 8
FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDY = "look there for the cause; the same command continues from the last checkpoint."


@contextmanager
def ending_together(world: World, directory: Path, *, where: Callable[[], str]) -> Iterator[None]:
    """One sentence for a run in which a process fails, whichever it is; then all exit with 1.

    The first process with an error of its own says it. In the others a collective fails, because
    that one has left: they leave without a word. When nobody could say why, because a process was
    killed, hangs, or its machine is out of reach, the others name it.
    """
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}" if _is_first(world) else 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            where_full = error.filename or directory
            said = f"error: there is no room for {where_full} ({error.strerror}); make some, and "
            sys.exit(said + "give the same command again." if _is_first(world) else 1)
        if world.size == 1 or not is_of_a_collective(error):
            _is_first(world)
            raise
        traceback.clear_frames(error.__traceback__)  # ends helper processes, which are waited for
        found = _ask(world, lambda: _absent(world))
        if not found.telling:
            time.sleep(SECONDS_BETWEEN_LOOKS)  # the store may live here, and another one is telling
            sys.exit(1)
        sys.exit(f"error: {_told(found, directory, why=reason(error), where=where(), world=world)}")


def _is_first(world: World) -> bool:
    """Does this process tell of the fault? Only the first one does."""
    return world.store.add("nmm/fault", 1) == 1


@contextmanager
def watched(
    directory: Path, *, timeout_minutes: float, world: World, where: Callable[[], str]
) -> Iterator[Heartbeat]:
    """End the process, with a sentence, when it stays in one phase longer than `timeout_minutes`.

    A thread looks, because what hangs cannot: a collective of NCCL, a read of a dead disk.
    """
    beating, done = Heartbeat(directory, rank=world.rank), Event()
    limit = 60 * timeout_minutes
    patience = GLOO_FIRST if world.size > 1 and world.device.type == "cpu" else 1.0

    def watch() -> None:
        idle, beats = 0.0, 0
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            # Counted, not read off a clock: while all of the process is stopped, nobody hangs.
            idle = idle + SECONDS_BETWEEN_LOOKS if beating.beats == beats else 0.0
            beats = beating.beats
            called = idle > limit * patience / 2 and _is_called(world)
            if called or idle > limit * patience:
                _leave(beats, directory, limit=limit, where=where(), world=world)

    Thread(target=watch, daemon=True).start()
    try:
        yield beating
        beating.enter(Phase.end)
    finally:
        done.set()
        beating.close()


def _is_called(world: World) -> bool:
    """Does another process call the roll, because it waits too long?"""
    with suppress(dist.DistError):
        return world.store.check(["nmm/roll"])
    return False


def _leave(beats: int, directory: Path, *, limit: float, where: str, world: World) -> NoReturn:
    """Name those who hold up the run; the interpreter is not left in order, because it hangs."""
    found = _ask(world, lambda: _behind(world, beats=beats))
    if found.telling:
        why = f"no phase ended for {limit:.0f} seconds"
        told = _told(found, directory, why=why, where=where, world=world)
        print(f"error: {told}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_BETWEEN_LOOKS)  # the store may live here, and another one is telling
    os._exit(1)


@dataclass(frozen=True)
class Roll:
    """Which processes hold up the run, on which machines, and whether this one is to tell it.

    `answered`: they are there, but behind the others.
    """

    telling: bool
    lost: list[int]
    hosts: list[str]
    answered: bool = False


def _ask(world: World, roll: Callable[[], Roll]) -> Roll:
    """The roll; without an answer, process 0 is lost, where the store lives.

    Where that cannot be reached, asking may take for ever.
    """
    answers: list[Roll] = []

    def ask() -> None:
        with suppress(dist.DistError):
            answers.append(roll())

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(3 * SECONDS_TO_ANSWER)
    if answers:
        return answers[0]
    # Process 0 may also have left because another tells; when it hangs, a machine has one voice.
    hangs, is_local_main = asking.is_alive(), os.environ["LOCAL_RANK"] == "0"
    return Roll(world.rank == 1 or (hangs and is_local_main), [0], [os.environ["MASTER_ADDR"]])


def _absent(world: World) -> Roll:
    """Who does not answer when a collective has failed.

    They were killed, hang, or are out of reach.
    """
    present = _collect("is here", "", world=world, until=lambda: world.store.check(["nmm/fault"]))
    lost = [rank for rank in range(world.size) if rank not in present]
    return Roll(*_first_with_hosts(lost, answered=len(present), world=world))


def _behind(world: World, *, beats: int) -> Roll:
    """Who does not answer when nothing has failed; if all do, those with the fewest beats."""
    world.store.set("nmm/roll", "")
    counts = _collect("beats", str(beats), world=world, until=lambda: False)
    lost = [rank for rank in range(world.size) if rank not in counts]
    if lost:
        return Roll(*_first_with_hosts(lost, answered=len(counts), world=world))
    fewest = min(int(count) for count in counts.values())
    lost = [rank for rank, count in counts.items() if int(count) == fewest]
    found = _first_with_hosts(lost, answered=len(counts), world=world)
    return Roll(*found, answered=True)


def _collect(title: str, answer: str, *, world: World, until: Callable[[], bool]) -> dict[int, str]:
    """What every process answers to a question, of those that do in time."""
    keys = [f"nmm/{title} {rank}" for rank in range(world.size)]
    world.store.set(keys[world.rank], answer)
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    while time.monotonic() < deadline and not world.store.check(keys) and not until():
        time.sleep(0.1)
    there = [rank for rank, key in enumerate(keys) if world.store.check([key])]
    return {rank: world.store.get(keys[rank]).decode() for rank in there}


def _first_with_hosts(
    lost: list[int], *, answered: int, world: World
) -> tuple[bool, list[int], list[str]]:
    """Whether this process tells, who is lost, and on which machines.

    The one that tells waits until all who answered know that it does: the store may live in it.
    """
    hosts = sorted({world.store.get(f"nmm/host of {rank}").decode() for rank in lost})
    if not _is_first(world):
        return False, lost, hosts
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    with suppress(dist.DistError):
        while world.store.add("nmm/fault", 0) < answered and time.monotonic() < deadline:
            time.sleep(0.1)
    return True, lost, hosts


def _told(found: Roll, directory: Path, *, why: str, where: str, world: World) -> str:
    """The sentence about those who are lost, whose last places go into the file as well."""
    if not found.lost:
        return (
            f"all {world.size} processes answer {where}, but one came too late ({why}); raise "
            "run.timeout_minutes, or see which one is slow; the same command continues."
        )
    places = {rank: heartbeat.read(directory, rank) for rank in found.lost}
    _note(directory, places, why=why)
    more = f" and {len(found.lost) - NAMED} more" if found.lost[NAMED:] else ""
    named = ", ".join(map(str, found.lost[:NAMED])) + more
    does = "does not go on" if found.answered else "no longer answers"
    known = [(rank, place) for rank, place in places.items() if place][:NAMED]
    was = "".join(
        f"{'it' if len(places) == 1 else f'process {rank}'} was {place.sentence()}; "
        for rank, place in known
    )
    return (
        f"process {named} of {world.size} {does} {where} (on {', '.join(found.hosts)[:80]}): "
        f"{why}; {was}{REMEDY}"
    )


def _note(directory: Path, places: dict[int, heartbeat.Place | None], *, why: str) -> None:
    """A row of faults.jsonl for each; a disk that cannot be written must not hide the sentence."""
    rows = [
        {"time": wall_time(), "rank": rank, "reason": why, **(vars(place) if place else {})}
        for rank, place in places.items()
    ]
    with suppress(OSError), closing(Lines(directory / FILE)) as lines:
        for row in rows:
            lines.write(json.dumps(row))
