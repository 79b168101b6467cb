"""Trying again: how often, after which waits, and the sentence at the end."""

import time
import zlib
from collections.abc import Callable
from typing import TypeVar

from data import remote
from nmm.errors import UserError

T = TypeVar("T")
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 30.0


class NotThereError(UserError):
    """The server has answered that a URL does not exist, or not for us: no other try is better."""


class NotAllowedError(NotThereError):
    """Not for us. Some servers say so of what does not exist, to those who may not list it."""


def retry(action: Callable[[], T], *, path: str, tries: int, done: str = "read") -> T:
    """What `action` returns at one of at most `tries` tries; else a UserError about `path`.

    `done` is what cannot be done with it.
    """
    for number in range(tries):
        try:
            return action()
        except Exception as error:
            if not remote.is_fault(error):
                raise
            if remote.is_url(path) and isinstance(error, (FileNotFoundError, PermissionError)):
                refused = isinstance(error, PermissionError)
                raise (NotAllowedError if refused else NotThereError)(
                    f"{path} does not exist or may not be {done} ({cause_of(error)}); correct its "
                    "name, or the credentials."
                ) from None
            if number + 1 == tries:
                raise UserError(
                    f"{path} cannot be {done} ({cause_of(error)}), after {tries} tries; "
                    "bring the storage back and run the same command again."
                ) from None
        time.sleep(wait_seconds(path, number=number))
    raise AssertionError("the last try returns or raises")


def wait_seconds(path: str, *, number: int) -> float:
    """About 0.1, 0.2, 0.4, ...: half to one and a half of that by the path, without a draw.

    A server that refuses a crowd would meet the same crowd again if all waited equally long.
    """
    share = zlib.crc32(f"{path} {number}".encode()) / 2**32
    return min(FIRST_WAIT_SECONDS * 2**number, LONGEST_WAIT_SECONDS) * (0.5 + share)


def cause_of(error: Exception) -> str:
    """One line: what the system or the server says, else the kind of the error."""
    said = getattr(error, "strerror", None) or str(error)
    if not said:
        return "no answer in time" if remote.is_timeout(error) else type(error).__name__
    return str(said).splitlines()[0]
