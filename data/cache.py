"""A bounded folder of whole files, filled and emptied by several processes at once."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nmm.errors import UserError

COPY, PART = ".copy", ".part"
WAIT_SECONDS = 0.05


@dataclass(frozen=True)
class Cache:
    """Copies in `directory`, at most `capacity_bytes` together; the least recently used go first.

    A copy is written as NAME.part, locked by its writer and as large as it will be, and renamed
    when it is complete: the sizes of all files are the space in use, nobody reads half a copy, and
    two processes that want the same file make one copy. The lock of a killed writer is free, so its
    part is known as a leftover.
    """

    directory: str
    capacity_bytes: int

    def open(
        self, name: str, *, size: Callable[[], int], fill: Callable[[BinaryIO], None]
    ) -> BinaryIO:
        """The copy of `name`; if there is none, it is made from `size` and by `fill`."""
        path = self._path(name)
        while True:
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                self._make(path, name=name, size=size, fill=fill)
                continue
            os.utime(file.fileno())
            return file

    def drop(self, name: str) -> None:
        """Forget a copy."""
        self._path(name).unlink(missing_ok=True)

    def check(self, needed_bytes: int, *, at_once_bytes: int) -> None:
        """Refuse, before any work, a folder that cannot be written or is too small.

        `needed_bytes` is all that will ever be asked for, `at_once_bytes` what is read by turns.
        """
        if self.capacity_bytes < at_once_bytes:
            raise UserError(
                f"data.cache_gigabytes is {self.capacity_bytes / 1e9:g} but the shards that are "
                f"read at the same time take {at_once_bytes / 1e9:.3g}; set it to at least that."
            )
        try:
            os.makedirs(self.directory, exist_ok=True)
            with self._locked():
                used = sum(status.st_size for _, status in self._entries())
                free = shutil.disk_usage(self.directory).free
        except OSError as error:
            raise UserError(self._unusable(error)) from None
        wanted = min(needed_bytes, self.capacity_bytes)
        if used + free < wanted:
            raise UserError(
                f"data.cache_dir is {self.directory}, whose disk has room for "
                f"{(used + free) / 1e9:.3g} of the {wanted / 1e9:.3g} gigabytes that the cache may "
                "take; lower data.cache_gigabytes, or choose another folder."
            )

    def _path(self, name: str) -> Path:
        return Path(self.directory, hashlib.sha256(name.encode()).hexdigest()[:32] + COPY)

    def _make(
        self, path: Path, *, name: str, size: Callable[[], int], fill: Callable[[BinaryIO], None]
    ) -> None:
        """Make the copy, unless another process has made it meanwhile."""
        part = path.with_suffix(PART)
        try:
            with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_named(file, part):
                    return  # its writer has renamed or removed it while we waited for the lock
                try:
                    if not path.exists():
                        self._reserve(file, size=size(), name=name)
                        fill(file)
                        file.flush()
                        part.rename(path)
                finally:
                    if _is_named(file, part):
                        part.unlink()
        except OSError as error:
            raise UserError(self._unusable(error)) from None

    def _reserve(self, file: BinaryIO, *, size: int, name: str) -> None:
        """Make `file` as large as it will be, when older copies and other parts leave the room."""
        if size > self.capacity_bytes:
            raise UserError(
                f"data.cache_gigabytes is {self.capacity_bytes / 1e9:g} but {name} has "
                f"{size / 1e9:.3g}; raise it, or set data.cache_dir=null."
            )
        while True:
            with self._locked():
                if self._evict(self.capacity_bytes - size):
                    if size:
                        os.posix_fallocate(file.fileno(), 0, size)
                    return
            time.sleep(WAIT_SECONDS)  # others fill what they have reserved; then it can go

    def _evict(self, allowed_bytes: int) -> bool:
        """Remove leftovers, and old copies until at most `allowed_bytes` stay; did it succeed?"""
        for path, _ in self._entries():
            if path.suffix == PART:
                _remove_leftover(path)
        entries = self._entries()
        used = sum(status.st_size for _, status in entries)
        for path, status in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if used <= allowed_bytes:
                break
            if path.suffix == COPY:
                path.unlink(missing_ok=True)
                used -= status.st_size
        return used <= allowed_bytes

    def _entries(self) -> list[tuple[Path, os.stat_result]]:
        """All copies and parts; a part may become a copy, or go, at any time."""
        found = []
        for path in Path(self.directory).iterdir():
            if path.suffix in (COPY, PART):
                with suppress(FileNotFoundError):
                    found.append((path, path.stat()))
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: who counts the space must be the only one who takes some."""
        with Path(self.directory, "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _unusable(self, error: OSError) -> str:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some, or lower data.cache_gigabytes" if full else "choose another folder"
        return (
            f"data.cache_dir is {self.directory}, which cannot be written "
            f"({error.strerror or error}); {remedy}, or set it to null."
        )


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Is `path` still the name of this open file?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_leftover(part: Path) -> None:
    """Remove the part of a writer that was killed: nobody holds its lock."""
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(file, part):
                part.unlink()
    except (FileNotFoundError, BlockingIOError):
        pass
