"""Reading tar shards: samples as byte ranges, and the members inside such a range.

A sample is a run of adjacent members of one key. `dir.1/cat.0.jpg` has the key `dir.1/cat` and the
extension `0.jpg`: the first dot of the base name divides them. Hidden files, directories and links
are no members.
"""

import tarfile
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.samples import Contents, NotAShardError, Sample, archive_of, empty

BLOCK_BYTES = 512
END_BYTES = 2 * BLOCK_BYTES
PLAIN_FILE = b"0\0"
# What tarfile raises on headers that lie about their numbers, or are chains without end.
HEADER_ERRORS = (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError)


class Scan(NamedTuple):
    """The samples of a shard in its order, and the rest of it."""

    samples: list[Sample]
    contents: Contents


def scan(path: Path) -> Scan:
    """All samples of a shard from its headers; raises NotAShardError."""
    contents = Contents()
    by_key: dict[str, Sample] = {}
    last, end = None, 0
    size = path.stat().st_size
    for member, stop in _headers(path, contents):
        key, extension = split_name(member.name)
        end = stop
        if not member.isfile() or not key.rpartition("/")[2]:
            contents.others.append((_what(member), member.name))
            continue
        contents.extensions[extension] += 1
        sample = by_key.get(key)
        if sample is None:
            sample = by_key[key] = Sample(key, member.offset, stop)
        elif sample is not last:
            sample.fault = "not_adjacent"
        elif extension in sample.extensions:
            sample.fault = "duplicate_member"
        sample.extensions.add(extension)
        last = sample
        if member.offset_data + member.size > size or stop - BLOCK_BYTES >= size:
            sample.fault = "truncated"
        elif not sample.fault:
            sample.stop = stop
    contents.defects += _ending(contents.damaged_at, size=size, end=end)
    return Scan(list(by_key.values()), contents)


def _ending(damaged_at: int | None, *, size: int, end: int) -> list[tuple[str, str]]:
    """What is wrong with the end of an archive whose last readable member ends at `end`."""
    if damaged_at is not None and damaged_at >= size:
        return [("cut_short", f"after {size:,} bytes")]
    if damaged_at is not None:
        return [("unreadable_tail", f"from byte {damaged_at:,}")]
    if size - end < END_BYTES:
        return [("no_end_blocks", f"{size - end} of {END_BYTES} bytes")]
    return []


def split_name(name: str) -> tuple[str, str]:
    """(key, lower-case extension) of a member name; what is not UTF-8 is escaped.

    "dir.1/cat.0.JPG" -> ("dir.1/cat", "0.jpg")
    """
    directory, slash, base = name.encode("utf-8", "backslashreplace").decode().rpartition("/")
    stem, _, extension = base.partition(".")
    return directory + slash + stem, extension.lower()


def members_of(raw: bytes) -> dict[str, bytes]:
    """Extension -> bytes of the members in the byte range of one sample.

    Plain headers are read by hand, 20 times faster than by tarfile, which reads all others.
    """
    members: dict[str, bytes] = {}
    at = 0
    while at < len(raw):
        header = raw[at : at + BLOCK_BYTES]
        if header[156] not in PLAIN_FILE or header[257:262] != b"ustar" or header[124] & 0x80:
            return _members_by_tarfile(raw)
        size = int(header[124:136].split(b"\0", 1)[0].strip() or b"0", 8)
        name = header[:100].split(b"\0", 1)[0]
        at += BLOCK_BYTES
        if not name.endswith(b"/"):
            key, extension = split_name(name.decode("utf-8", "surrogateescape"))
            if key.rpartition("/")[2]:
                members[extension] = raw[at : at + size]
        at += _padded(size)
    return members


def _members_by_tarfile(raw: bytes) -> dict[str, bytes]:
    """The same; without those behind a header that lies, which the sample then lacks."""
    members: dict[str, bytes] = {}
    with suppress(*HEADER_ERRORS), tarfile.open(fileobj=BytesIO(raw), mode="r:") as tar:
        for member in tar:
            key, extension = split_name(member.name)
            data = tar.extractfile(member) if member.isreg() else None
            if data is not None and key.rpartition("/")[2]:
                members[extension] = data.read()
    return members


def _headers(path: Path, found: Contents) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Every member with the place of the next header; sets `damaged_at` if it stops too early."""
    with path.open("rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - owns no file
        except (*HEADER_ERRORS, MemoryError):
            raise _not_a_tar(path) from None
        try:
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= member.offset:  # else without end
                    found.damaged_at = member.offset
                    return
                # Else tarfile keeps every header of the shard; typeshed does not know the list.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                yield member, tar.offset
        except (*HEADER_ERRORS, MemoryError):  # a name of terabytes
            found.damaged_at = tar.offset
            return
        if _holds_data(file, tar.offset):
            found.damaged_at = tar.offset


def _what(entry: tarfile.TarInfo) -> str:
    """The kind of an entry that is no member."""
    if entry.isdir():
        return "directory"
    if entry.issym() or entry.islnk():
        return "link"
    return "hidden_file" if entry.isfile() else "special_file"


def _holds_data(file: BinaryIO, start: int) -> bool:
    """Is anything but the zeros of an archive's end left behind `start`?"""
    file.seek(start)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return True
    return False


def _not_a_tar(path: Path) -> NotAShardError:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return empty(path)
    if archive := archive_of(start):
        said = f"{path} is {archive} data and not a plain tar; unpack it, or delete it."
        return NotAShardError(said, reason="compressed")
    said = f"{path} is not a tar (it starts with {start!r}); write the shard again, or delete it."
    return NotAShardError(said, reason="not_a_tar")


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
