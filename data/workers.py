"""How helper processes start: forked on Linux, to share the index and be there in milliseconds."""

import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext


def context() -> BaseContext:
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@contextmanager
def forking() -> Iterator[None]:
    """Silence the warning that a process with threads forks.

    Our children only read, decode and tokenise: they touch no GPU, no collective and no log, whose
    locks a thread of the parent may hold.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*multi-threaded.*fork", category=DeprecationWarning
        )
        yield
