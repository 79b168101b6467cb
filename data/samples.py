"""What any shard holds: samples as byte ranges, and what is wrong with the file around them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nmm.errors import UserError

# How files of other programs begin, for sentences that say what a file is.
ARCHIVE_STARTS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard", b"PK": "zip"}


class NotAShardError(UserError):
    """A file that is no shard at all; `reason` is its name in data/prepare/findings.py."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class BadSample(Exception):  # noqa: N818 - it is a verdict on a sample, counted and not fatal
    """A sample cannot become a document; `reason` is a stable name, counted as dropped/REASON."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Sample:
    """Members of one key in bytes [start, stop); `fault` is a reason to drop it, or ""."""

    key: str
    start: int
    stop: int
    fault: str = ""
    extensions: set[str] = field(default_factory=set)


@dataclass
class Contents:
    """What a shard holds beside its samples; complete when all of these are read.

    extensions  how many members there are of each
    others      (what it is, name) of entries that are no members: directory, hidden file, link, ...
    damaged_at  behind this byte nothing can be read (None: all is well)
    defects     (reason, detail) of what is wrong with the file as a whole
    """

    extensions: Counter[str] = field(default_factory=Counter)
    others: list[tuple[str, str]] = field(default_factory=list)
    damaged_at: int | None = None
    defects: list[tuple[str, str]] = field(default_factory=list)

    def told_extensions(self) -> str:
        """The extensions, the most frequent first."""
        return ", ".join(f".{name}" for name, _ in self.extensions.most_common(8)) or "no files"


def empty(path: Path) -> NotAShardError:
    """What to say of a file without bytes."""
    said = f"{path} is empty (0 bytes); write the shard again, or delete it."
    return NotAShardError(said, reason="empty_file")


def archive_of(start: bytes) -> str | None:
    """What program made a file that begins so."""
    return next((name for head, name in ARCHIVE_STARTS.items() if start.startswith(head)), None)
