"""Bytes of files that may be compressed: plain, gzip or zstandard, told by their first bytes."""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data import compression
from data.prepare.convert.left_out import Unusable
from data.prepare.convert.values import MAX_BYTES, MEBIBYTES

SUFFIXES = (".gz", ".zst")
BUFFER_BYTES = 1 << 17


def packed_as(path: Path) -> str | None:
    """The suffix that a file of such a beginning should have; None: it is not compressed."""
    with path.open("rb") as file:
        start = file.read(4)
    found = (suffix for suffix in SUFFIXES if compression.is_packed(start, suffix=suffix))
    return next(found, None)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """What the file holds, unpacked; reading raises DamagedError where it is cut or broken."""
    suffix = packed_as(path)
    with path.open("rb") as file:
        if suffix is None:
            yield file
        else:
            unpacked = _Unpacked(compression.unpack(file, suffix=suffix))
            yield io.BufferedReader(unpacked, buffer_size=BUFFER_BYTES)


def lines(file: io.BufferedIOBase) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long to be a document."""
    while line := file.readline(MAX_BYTES):
        if len(line) < MAX_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(MAX_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None


def gunzip(data: bytes) -> bytes:
    """A gzipped member of a tar."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(data, MAX_BYTES)
    except zlib.error:
        raise Unusable("broken gzip") from None
    if not unpacker.eof:
        reason = f"more than {MEBIBYTES} MiB" if unpacker.unconsumed_tail else "broken gzip"
        raise Unusable(reason)
    return unpacked


class _Unpacked(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._chunk = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._chunk:
            following = next(self._chunks, None)
            if following is None:
                return 0
            self._chunk = following
        size = min(len(buffer), len(self._chunk))
        buffer[:size], self._chunk = self._chunk[:size], self._chunk[size:]
        return size
