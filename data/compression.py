"""Reading .gz and .zst files as what they unpack to, from the beginning to the end or to damage."""

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import zstandard

READ_BYTES = 1 << 12  # little: it may unpack to 10,000 times as much, and damage in it loses it all
WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs
SKIPPABLE_FRAME = b"\x2a\x4d\x18"  # after its first byte; parallel zstd programs begin with one


class DamagedError(Exception):
    """Nothing behind this can be unpacked; `reason` is its name in data/prepare/findings.py."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Frame(Protocol):
    """A part of a file that is packed by itself."""

    def decompress(self, data: bytes, /) -> bytes: ...
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


def is_packed(start: bytes, *, suffix: str) -> bool:
    """Does a file of that suffix begin as it should?"""
    if suffix == ".gz":
        return start.startswith(b"\x1f\x8b")
    return start.startswith(b"\x28\xb5\x2f\xfd") or start[1:4] == SKIPPABLE_FRAME


def unpack(file: BinaryIO, *, suffix: str) -> Iterator[bytes]:
    """The bytes of all frames, one after the other; raises DamagedError."""
    new, padding = _frames(suffix)
    data = b""
    while data := _next(file, data, padding=padding):
        frame = new()
        while not frame.eof:
            if not data:
                raise DamagedError("cut_short")
            try:
                yield frame.decompress(data)
            except (zlib.error, zstandard.ZstdError):
                raise DamagedError("unreadable_tail") from None
            data = b"" if frame.eof else file.read(READ_BYTES)
        data = frame.unused_data


def _next(file: BinaryIO, data: bytes, *, padding: bytes) -> bytes:
    """The beginning of the next frame, of which `data` is read already; none at the end."""
    data = data.lstrip(padding)
    while not data and (read := file.read(READ_BYTES)):
        data = read.lstrip(padding)
    return data


def _frames(suffix: str) -> tuple[Callable[[], Frame], bytes]:
    """How to begin a frame, and what may lie between frames."""
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31), b"\0"  # tapes pad with zeros
    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
    return unpacker.decompressobj, b""
