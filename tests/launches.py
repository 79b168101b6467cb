"""Real launches for tests: start, watch, signal, and leave no process behind."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nmm import heartbeat
from tests.runs import environment, rows


@contextmanager
def started(
    arguments: list[str], *, log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A command in a session of its own, printing to `log`; at the end nothing of it is left."""
    with log.open("a") as out:
        process = subprocess.Popen(
            arguments,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment() | (env or {}),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def wait_until(condition: Callable[[], object], *, seconds: float, log: Path) -> None:
    """Poll; a condition that does not come true in time fails with what was printed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.005)


@contextmanager
def standing_still(run: Path) -> Iterator[None]:
    """The two processes of a run do nothing meanwhile: it cannot end before what comes next."""
    places = [heartbeat.read(run, rank) for rank in (0, 1)]
    pids = [place.pid for place in places if place]
    assert len(pids) == 2, places
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # somebody else has let it go on, and it has ended
                os.kill(pid, signal.SIGCONT)


def children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    below = children(pid)
    return [*below, *(further for child in below for further in descendants(child))]


def pid_of_rank(launcher: int, rank: int) -> int:
    """The process that trains as `rank` below a launcher; its helpers are further down."""
    for pid in descendants(launcher):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables:
            return pid
    raise AssertionError((launcher, rank))


def last_step(run: Path, *, log: str = "losses") -> int:
    """The step of the last whole row of a log, -1 when there is none."""
    path = run / f"{log}.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    return int(whole.splitlines()[-1].split('"step": ')[1].split(",")[0]) if whole else -1


def check_same_logs(one: Path, other: Path) -> None:
    """To the bit, on every key that does not depend on the machine."""
    for name in ("losses.jsonl", "evals.jsonl", "quarantine.jsonl"):
        assert rows(one / name) == rows(other / name), name
