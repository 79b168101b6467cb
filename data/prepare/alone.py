"""One process at a time writes to a folder."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nmm.errors import UserError

WAIT_SECONDS = 10.0  # for the orphans of a killed command to see that they are


@contextmanager
def alone(out: Path, *, doing: str) -> Iterator[None]:
    """Hold the folder, with the processes that are forked meanwhile, until all have ended.

    Raises UserError where another command holds it: it `doing` ("converts") there.
    """
    folder = os.open(out, os.O_RDONLY)
    try:
        patience = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise UserError(
                        f"--out is {out}, where another process {doing}; wait until it ends."
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
                    raise
                break  # a shared file system without locks: two commands are not told apart
        yield
    finally:
        os.close(folder)
