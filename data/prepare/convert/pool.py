"""Work on numbered tasks in processes that leave nothing behind.

A pool of the library would do, but for three things: an interrupt must end it at once, a killed
worker must be named with its task, and workers must end when their parent was killed.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from data.workers import context, forking
from nmm.errors import UserError

Tell = Callable[[int], object]
Work = Callable[[int, Tell], None]
TELL_SECONDS = 0.2


class _Begun(NamedTuple):
    task: int


class _Told(NamedTuple):
    count: int


class _Failed(NamedTuple):
    sentence: str


def run(tasks: Sequence[int], *, work: Work, processes: int, tell: Tell) -> None:
    """Do all tasks; `work` gets a task, and tells how much it did as it does it.

    Raises what a task raised as UserError, and for a worker that died.
    """
    if processes <= 1:
        for task in tasks:
            work(task, tell)
        return
    way: Any = context()
    following = way.Value("L", 0)
    running: dict[Connection, BaseProcess] = {}
    try:
        with forking():
            for _ in range(min(processes, len(tasks))):
                receiver, sender = way.Pipe(duplex=False)
                arguments = (tasks, following, work, sender, os.getpid())
                process = way.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                sender.close()
                running[receiver] = process
        _listen(running, tell=tell)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _listen(running: dict[Connection, BaseProcess], *, tell: Tell) -> None:
    """Until all have ended."""
    doing: dict[Connection, int] = {}
    open_ends = dict(running)
    while open_ends:
        for end in wait(list(open_ends)):
            assert isinstance(end, Connection)
            try:
                message = end.recv()
            except (EOFError, OSError):  # OSError: killed while it spoke
                process = open_ends.pop(end)
                process.join()
                if process.exitcode:
                    raise UserError(_death(doing.get(end), process.exitcode)) from None
                continue
            match message:
                case _Begun(task):
                    doing[end] = task
                case _Told(count):
                    tell(count)
                case _Failed(sentence):
                    raise UserError(sentence)


def _death(task: int | None, code: int) -> str:
    if code > 0:
        return "a worker has failed, as printed above; this is an error in the program."
    name = signal.Signals(-code).name
    return (
        f"a worker was killed by {name} in task {task}, perhaps for its memory or by a decoder; "
        f"lower --workers, and the same command continues."
    )


def _serve(
    tasks: Sequence[int], following: Any, work: Work, sender: Connection, parent: int
) -> None:
    """A worker's life: the next task, and the next."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tell = _Teller(sender, parent)
    with suppress(BrokenPipeError):
        try:
            while (task := _next(tasks, following)) is not None:
                sender.send(_Begun(task))
                work(task, tell)
            tell.flush()
        except (UserError, OSError) as error:
            sender.send(_Failed(str(error)))


def _next(tasks: Sequence[int], following: Any) -> int | None:
    with following.get_lock():
        number = following.value
        following.value += 1
    return tasks[number] if number < len(tasks) else None


class _Teller:
    """Tells the parent how much was done, a few times a second, and ends with it."""

    def __init__(self, sender: Connection, parent: int) -> None:
        self._sender, self._parent = sender, parent
        self._count, self._told = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        if os.getppid() != self._parent:
            os._exit(1)
        self._count += count
        if time.monotonic() - self._told > TELL_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._sender.send(_Told(self._count))
        self._count, self._told = 0, time.monotonic()
