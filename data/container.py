"""A shard of any form as its samples: a tar (data/tar.py) or JSON lines (data/jsonl.py)."""

import zlib
from collections.abc import Iterator
from pathlib import Path

from data import jsonl, tar
from data.samples import Contents, Sample
from data.store import LOCAL, Store, is_url, name_of
from nmm.config import Kind, Layout
from nmm.errors import UserError

COMPRESSED = (".jsonl.gz", ".jsonl.zst")
JSON_LINES = (".jsonl", *COMPRESSED)
SUFFIXES = (".tar", *JSON_LINES)


def is_shard(path: str) -> bool:
    """Is it one by its name?"""
    return name_of(path).endswith(SUFFIXES)


def is_json_lines(path: str) -> bool:
    """Are its samples lines, whose keys are their numbers?"""
    return name_of(path).endswith(JSON_LINES)


def is_compressed(path: str) -> bool:
    """Can it only be read from its beginning? Then training reads stored token ids instead."""
    return name_of(path).endswith(COMPRESSED)


def check(path: str, layout: Layout) -> None:
    """Refuse, before it is read, a shard whose form cannot hold this kind."""
    if not is_json_lines(path):
        return
    if layout.kind is not Kind.text and is_compressed(path):
        raise UserError(
            f"{path} is compressed, so it can hold documents of kind text only, not "
            f"{layout.kind.value}; make tars of it with `python -m data.prepare.convert`."
        )
    if layout.kind is Kind.text and layout.text_field is None:
        raise UserError(
            f"{path} holds JSON, and the field of its text is not named; add --text-field (often "
            f"text) here and data.sources.NAME.text_field to the config."
        )


def read(path: Path) -> tuple[Contents, Iterator[tuple[Sample, bytes]]]:
    """The contents of a shard, and its samples with their bytes, in the order of the file.

    The contents are complete when the last sample is read. Raises NotAShardError.
    """
    if is_json_lines(path.name):
        return jsonl.read(path)
    scan = tar.scan(path)
    return scan.contents, _ranges(path, scan.samples)


def members_of(path: str, raw: bytes) -> dict[str, bytes]:
    """Extension -> bytes of the members of a sample, from the bytes of its range."""
    return {jsonl.MEMBER: raw} if is_json_lines(path) else tar.members_of(raw)


def document_bytes(
    path: Path | str, *, start: int, stop: int, crc: int, store: Store = LOCAL
) -> dict[str, bytes]:
    """Extension -> bytes of one document's members.

    Raises UserError for a changed shard, and for a read that fails again and again.
    """
    path = str(path)
    assert not is_compressed(path), path
    return members_of(path, checked_bytes(path, start=start, stop=stop, crc=crc, store=store))


def checked_bytes(path: str, *, start: int, stop: int, crc: int, store: Store) -> bytes:
    """Bytes [start, stop) with that crc32; UserError where the file holds others."""
    raw = _read(path, start=start, stop=stop, store=store)
    found = zlib.crc32(raw)
    if found != crc and is_url(path):
        # A copy in the cache can be older than the index, and one answer can be wrong.
        raw = store.read(path, start=start, stop=stop, fresh=True)
        found = zlib.crc32(raw)
    if found != crc:
        raise UserError(
            f"{path} has changed since it was indexed (bytes {start} to {stop} differ); "
            f"run `python -m data.prepare.index` on the shard with --force."
        )
    return raw


def _read(path: str, *, start: int, stop: int, store: Store) -> bytes:
    """The bytes [start, stop), or none of a file that ends before: that is another file."""
    try:
        return store.read(path, start=start, stop=stop)
    except EOFError:
        return b""


def _ranges(path: Path, samples: list[Sample]) -> Iterator[tuple[Sample, bytes]]:
    """The samples with their bytes, none of those with a fault, whose sizes may be lies."""
    with path.open("rb") as file:
        for sample in samples:
            file.seek(sample.start)
            yield sample, b"" if sample.fault else file.read(sample.stop - sample.start)
