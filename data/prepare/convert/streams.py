"""Bytes of files that may be compressed: plain, gzip or zstandard, told by their first bytes."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from data.prepare.convert.left_out import Unusable
from data.prepare.convert.values import MAX_BYTES, MEBIBYTES

GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# 16 KiB cannot become more than half a GiB: a zstandard block of 4 bytes holds at most 128 KiB.
CHUNK_BYTES = 1 << 14
MAX_WINDOW_BYTES = 1 << 31  # of zstd --long
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith((GZIP, ZSTANDARD))


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """What the file holds, unpacked; reading raises one of `DAMAGED` where it is cut or broken."""
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        if head.startswith(GZIP):
            with gzip.open(file) as unpacked:
                yield unpacked
        elif head.startswith(ZSTANDARD):
            yield io.BufferedReader(_Zstandard(file), buffer_size=1 << 17)
        else:
            yield file


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


class _Zstandard(io.RawIOBase):
    """All frames of a file, one after the other.

    The reader of the library takes a file that was cut for one that ends; this one raises EOFError.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._library = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._unpacked:
            self._packed = self._packed or self._file.read(CHUNK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                return 0
            self._frame = self._frame or self._library.decompressobj()
            self._unpacked = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size
