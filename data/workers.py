"""How helper processes start: forked on Linux, to share the index and be there in milliseconds."""

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from threading import Thread
from types import TracebackType

SECONDS_BETWEEN_LOOKS = 0.2  # for the parent; torch's own workers look every 5 seconds


def context() -> BaseContext:
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@contextmanager
def forking() -> Iterator[None]:
    """Silence the warning that a process with threads forks.

    Our children only read, decode and tokenise: they touch no GPU, no collective and no log, whose
    locks a thread of the parent may hold.

    NOTE: before Python 3.12 a child waits for ever in the interpreter itself if it is forked while
    a thread of gloo enters or leaves it, to drop the objects of the last collective (gh-112275 of
    CPython). Sleeping hands that thread the GIL.
    """
    time.sleep(0.05)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*multi-threaded.*fork", category=DeprecationWarning
        )
        yield


@contextmanager
def shielded() -> Iterator[None]:
    """Block SIGTERM for the processes that start here, and for all threads that they start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker: int, *, parent: int) -> None:
    """Let a helper process that was forked `shielded` end by SIGTERM only if its parent sent it.

    Schedulers and launchers send it to every process of a job. The parent then finishes its step,
    for which it needs the batches of its helpers. One whose parent was killed says nothing of it.
    """
    sys.excepthook = _unless_parent_left
    Thread(target=_end_when_parent_says, args=(parent,), daemon=True).start()


def _unless_parent_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """For the thread of multiprocessing that hands over batches; other errors go to the parent."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_when_parent_says(parent: int) -> None:
    """Or has left: until its helpers are gone, too, its connections look alive to the others."""
    while os.getppid() == parent:
        asked = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if asked and asked.si_pid == parent:
            break
    os._exit(0)
