"""Reading tar shards: samples as byte ranges, and the members inside such a range.

A sample is a run of adjacent members of one key. `dir.1/cat.0.jpg` has the key `dir.1/cat` and the
extension `0.jpg`: the first dot of the base name divides them. Hidden files, directories and links
are no members.
"""

import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from data.store import LOCAL, Store, is_url
from nmm.errors import UserError

BLOCK_BYTES = 512
PLAIN_FILE = b"0\0"
ARCHIVE_STARTS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard", b"PK": "zip"}


@dataclass
class Sample:
    """Adjacent members of one key in bytes [start, stop); `fault` is a reason to drop it, or ""."""

    key: str
    start: int
    stop: int
    fault: str = ""
    extensions: set[str] = field(default_factory=set)


@dataclass
class Scan:
    """What a shard holds; behind byte `damaged_at` nothing can be read (None: all is well).

    others  (what it is, name) of entries that are no members: directory, hidden file, link, ...
    end     the byte behind the last member, where the zeros of an archive's end belong
    """

    samples: list[Sample] = field(default_factory=list)
    extensions: Counter[str] = field(default_factory=Counter)
    others: list[tuple[str, str]] = field(default_factory=list)
    damaged_at: int | None = None
    end: int = 0


def scan(path: Path) -> Scan:
    """All samples of a shard from its headers; raises UserError for what is not a tar."""
    found = Scan()
    by_key: dict[str, Sample] = {}
    last = None
    size = path.stat().st_size
    for member, stop in _headers(path, found):
        key, extension = split_name(member.name)
        found.end = stop
        if not member.isfile() or not key.rpartition("/")[2]:
            found.others.append((_what(member), member.name))
            continue
        found.extensions[extension] += 1
        sample = by_key.get(key)
        if sample is None:
            sample = by_key[key] = Sample(key, member.offset, stop)
            found.samples.append(sample)
        elif sample is not last:
            sample.fault = "not_adjacent"
        elif extension in sample.extensions:
            sample.fault = "duplicate_member"
        sample.extensions.add(extension)
        last = sample
        if member.offset_data + member.size > size:
            sample.fault = "truncated"
        elif not sample.fault:
            sample.stop = stop
    return found


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
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        name = header[:100].split(b"\0", 1)[0]
        at += BLOCK_BYTES
        if not name.endswith(b"/"):
            key, extension = split_name(name.decode("utf-8", "surrogateescape"))
            if key.rpartition("/")[2]:
                members[extension] = raw[at : at + size]
        at += _padded(size)
    return members


def document_bytes(
    path: Path | str, *, start: int, stop: int, crc: int, store: Store = LOCAL
) -> dict[str, bytes]:
    """Extension -> bytes of one document's members.

    Raises UserError for a changed shard, and for a read that fails again and again.
    """
    path = str(path)
    raw = _read(path, start=start, stop=stop, store=store)
    found = zlib.crc32(raw)
    if found != crc and is_url(path):
        # A copy in the cache can be older than the index, and one answer can be wrong.
        raw = store.read(path, start=start, stop=stop, fresh=True)
        found = zlib.crc32(raw)
    if found != crc:
        raise UserError(
            f"{path} has changed since it was indexed (bytes {start} to {stop} differ); "
            f"run `python -m data.prepare.index` on it with --force."
        )
    return members_of(raw)


def _read(path: str, *, start: int, stop: int, store: Store) -> bytes:
    """The bytes [start, stop), or fewer of a file that ends before: that is another file."""
    try:
        return store.read(path, start=start, stop=stop)
    except EOFError:
        return b""


def _members_by_tarfile(raw: bytes) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=BytesIO(raw), mode="r:") as tar:
        for member in tar:
            key, extension = split_name(member.name)
            data = tar.extractfile(member) if member.isreg() else None
            if data is not None and key.rpartition("/")[2]:
                members[extension] = data.read()
    return members


def _headers(path: Path, found: Scan) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Every member with the place of the next header; sets `damaged_at` if it stops too early."""
    with path.open("rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - owns no file
        except tarfile.TarError:
            raise UserError(_not_a_tar(path)) from None
        try:
            while (member := tar.next()) is not None:
                # Else tarfile keeps every header of the shard; typeshed does not know the list.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                yield member, tar.offset
        except tarfile.TarError:
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


def _not_a_tar(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return f"{path} is empty (0 bytes); write the shard again, or delete it."
    kind = next((name for head, name in ARCHIVE_STARTS.items() if start.startswith(head)), None)
    if kind:
        return f"{path} is {kind} data and not a plain tar; unpack it, or delete it."
    return f"{path} is not a tar (it starts with {start!r}); write the shard again, or delete it."


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
