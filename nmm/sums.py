"""Sizes and checksums of files: what was cut or changed is found before it is used."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK_BYTES = 2**22
MARKER = "COMPLETE"  # of a checkpoint: the sums of all its other files; written last


class Sum(NamedTuple):
    """What is known of a file that was written: its bytes, and the CRC-32 of them all."""

    num_bytes: int
    crc32: int


class Summing:
    """A file that is written from its beginning to its end, and the sum of what is in it so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sum = file, Sum(0, 0)
        self.fault: OSError | None = None

    def write(self, part: bytes) -> int:
        """All of it, or OSError."""
        try:
            self._file.write(part)
        except OSError as error:
            self.fault = error
            raise
        self.sum = Sum(self.sum.num_bytes + len(part), zlib.crc32(part, self.sum.crc32))
        return len(part)

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def summing(path: Path) -> Iterator[Summing]:
    """A new file; raises OSError when it cannot be written, whoever writes."""
    with path.open("wb") as file:
        written = Summing(file)
        try:
            yield written
        except RuntimeError:
            if written.fault is None:
                raise
            # torch says in its own words that a write did not come through, but not why.
            raise written.fault from None


def write_text(path: Path, text: str) -> Sum:
    """A small file, at once; raises OSError."""
    with summing(path) as file:
        file.write(text.encode())
    return file.sum


def fault_of(path: Path, *, expected: Sum) -> str | None:
    """What is wrong with a file, if anything is; it is read once, from beginning to end.

    Raises OSError where that cannot be told, because the disk or the network fails.
    """
    try:
        found = path.stat().st_size
        if found != expected.num_bytes:
            return f"{path.name} has {found} bytes instead of {expected.num_bytes}"
        crc32 = 0
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                crc32 = zlib.crc32(block, crc32)
    except FileNotFoundError:
        return f"{path.name} is not there"
    return None if crc32 == expected.crc32 else f"{path.name} has another checksum"
