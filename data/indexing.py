"""Read a shard once and count what its documents hold: the making of data/index.py's index."""

import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import container, documents, images, sequences
from data.documents import BadSample
from data.index import ShardIndex, assemble
from data.samples import Contents, Sample
from data.tokenizer import Tokenizer
from data.units import Units
from nmm.config import Layout
from nmm.errors import UserError

Dropped = list[tuple[str, str]]


class Counted(NamedTuple):
    """A usable document; `segments` are those of data/sequences.py."""

    sample: Sample
    crc: int
    variant: int
    segments: np.ndarray
    skipped_images: int
    largest_unit: int


def index_shard(path: Path, *, layout: Layout, tokenizer: Tokenizer) -> ShardIndex:
    """Read a shard and count its documents; raises UserError when it holds none of this kind."""
    container.check(str(path), layout)
    contents, samples = container.read(path)
    dropped: Dropped = []
    usable: list[Counted] = []
    for sample, raw in samples:
        if sample.fault:
            dropped.append((sample.fault, sample.key))
            continue
        members = container.members_of(path.name, raw)
        usable += _documents(
            sample, raw, members, layout=layout, tokenizer=tokenizer, dropped=dropped
        )
    if contents.damaged_at is not None:
        dropped.append(("unreadable_tail", f"byte {contents.damaged_at}"))
    if not usable:
        raise UserError(_no_document(path, layout=layout, contents=contents, dropped=dropped))
    return _assemble(
        usable,
        layout=layout,
        tokenizer=tokenizer,
        shard_bytes=path.stat().st_size,
        dropped=dropped,
    )


def _documents(
    sample: Sample,
    raw: bytes,
    members: dict[str, bytes],
    *,
    layout: Layout,
    tokenizer: Tokenizer,
    dropped: Dropped,
) -> Iterator[Counted]:
    """The usable documents of a sample; what is none goes to `dropped`."""
    crc = zlib.crc32(raw)
    for variant in range(documents.variants(layout, members)):
        try:
            parsed = documents.parse(layout, members, key=sample.key, variant=variant)
            segments = _segments(parsed.parts, tokenizer)
        except BadSample as bad:
            dropped.append((bad.reason, sample.key))
        else:
            largest = _largest_unit(parsed.parts)
            yield Counted(sample, crc, variant, segments, parsed.skipped_images, largest)


def _segments(parts: documents.Parts, tokenizer: Tokenizer) -> np.ndarray:
    for part in parts:
        if isinstance(part, bytes):
            images.check_header(part)
    segments = sequences.segments(sequences.encode(parts, tokenizer))
    if segments.max() <= 0 and segments.min() >= sequences.IMAGE_SEGMENT:
        raise BadSample("empty_text")
    return segments


def _largest_unit(parts: documents.Parts) -> int:
    return max((int(part.values.max()) for part in parts if isinstance(part, Units)), default=-1)


def _assemble(
    usable: list[Counted],
    *,
    layout: Layout,
    tokenizer: Tokenizer,
    shard_bytes: int,
    dropped: Dropped,
) -> ShardIndex:
    keys = [each.sample.key.encode() for each in usable]
    return assemble(
        layout=layout,
        tokenizer_hash=tokenizer.hash,
        shard_bytes=shard_bytes,
        dropped=dropped,
        start=np.array([each.sample.start for each in usable], np.int64),
        stop=np.array([each.sample.stop for each in usable], np.int64),
        crc=np.array([each.crc for each in usable], np.uint32),
        segment=np.concatenate([each.segments for each in usable]),
        border=_borders([len(each.segments) for each in usable]),
        variant=np.array([each.variant for each in usable], np.int32),
        skipped=np.array([each.skipped_images for each in usable], np.int32),
        largest_unit=max(each.largest_unit for each in usable),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_border=_borders([len(key) for key in keys]),
    )


def _borders(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _no_document(path: Path, *, layout: Layout, contents: Contents, dropped: Dropped) -> str:
    reasons = ", ".join(
        f"{count} {reason}" for reason, count in Counter(r for r, _ in dropped).most_common()
    )
    kind = layout.kind.value
    return (
        f"{path} holds no document of kind {kind}: it has {contents.told_extensions()} "
        f"({reasons}); see docs/data-format.md for what a {kind} shard holds."
    )
