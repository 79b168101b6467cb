"""How helper processes are started: forked on Linux, so that they share the index and start in milliseconds."""

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
    """Silence Python 3.12's warning that a process with threads forks: our children start no parallel region."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        yield
