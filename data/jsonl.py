"""Reading JSON lines: every line that is not blank is a sample with the single member "json".

Its key is its number in the file, from 1, and its bytes are those of the line, without the line
end. A line is never read half: where a file breaks off, its last line is dropped. Of .jsonl.gz and
.jsonl.zst the bytes are those that the file unpacks to.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data import compression
from data.compression import DamagedError
from data.samples import Contents, NotAShardError, Sample, archive_of, empty

MEMBER = "json"
PACKED = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 1 << 28


class Line(NamedTuple):
    """The line in bytes [start, start + size); a line that is too long comes without its bytes."""

    start: int
    size: int
    data: bytes


def read(path: Path) -> tuple[Contents, Iterator[tuple[Sample, bytes]]]:
    """The contents of a file, and its samples with their bytes; raises NotAShardError."""
    _check_start(path)
    contents = Contents()
    return contents, _samples(path, contents)


def _check_start(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise empty(path)
    if path.suffix in PACKED:
        if not compression.is_packed(start, suffix=path.suffix):
            raise NotAShardError(
                f"{path} is not compressed as its name says (it starts with {start!r}); name it as "
                f"what it is, or delete it.",
                reason="not_compressed",
            )
    elif archive := archive_of(start):
        raise NotAShardError(
            f"{path} is {archive} data and not JSON lines; name it as what it is, or unpack it.",
            reason="compressed",
        )


def _samples(path: Path, contents: Contents) -> Iterator[tuple[Sample, bytes]]:
    extensions = {MEMBER}
    with path.open("rb") as file:
        chunks = _chunks(file, contents, suffix=path.suffix)
        for number, line in enumerate(_lines(chunks), start=1):
            fault = "long_line" if line.size != len(line.data) else ""
            if contents.damaged_at is not None:
                fault = "truncated"  # this line came after the damage: it is what was before it
            if fault or line.data.strip():
                stop = line.start + line.size
                contents.extensions[MEMBER] += 1
                yield Sample(f"{number:08d}", line.start, stop, fault, extensions), line.data


def _chunks(file: BinaryIO, contents: Contents, *, suffix: str) -> Iterator[bytes]:
    """The bytes of the lines; `contents` learns where they break off."""
    if suffix not in PACKED:
        yield from iter(partial(file.read, CHUNK_BYTES), b"")
        return
    size = 0
    try:
        for chunk in compression.unpack(file, suffix=suffix):
            yield chunk
            size += len(chunk)
    except DamagedError as damage:
        contents.damaged_at = size
        contents.defects.append((damage.reason, f"after {size:,} unpacked bytes"))


def _lines(chunks: Iterable[bytes]) -> Iterator[Line]:
    """The lines of what lies in chunks one after the other; memory is bounded."""
    held: list[bytes] = []
    start = size = 0
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield Line(start, size + len(end), b"".join([*held, end]))
            start += size + len(end) + 1
            held, size = [], 0
        held.append(rest)
        size += len(rest)
        if size > LONGEST_LINE_BYTES:
            held.clear()
    if size:
        yield Line(start, size, b"".join(held))
