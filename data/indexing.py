"""Read a shard once and count what its documents hold: the making of data/index.py's index."""

import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data import container, documents, ids, images, sequences
from data.index import NO_TOKENS, ShardIndex, assemble
from data.samples import BadSample, Contents, Sample
from data.sequences import Texts
from data.tokenizer import Tokenizer
from data.units import Units
from nmm.config import Layout
from nmm.errors import UserError

Dropped = list[tuple[str, str]]


class Counted(NamedTuple):
    """A usable document; `segments` are those of data/sequences.py, `token_crc` of stored ids."""

    sample: Sample
    crc: int
    variant: int
    segments: np.ndarray
    skipped_images: int
    largest_unit: int
    token_crc: int


def index_shard(
    path: Path, *, layout: Layout, tokenizer: Tokenizer, tokens: BinaryIO | None = None
) -> ShardIndex:
    """Read a shard and count its documents; raises UserError when it holds none of this kind.

    The ids of its texts are written to `tokens`, which a compressed shard must have.
    """
    container.check(str(path), layout)
    assert tokens or not container.is_compressed(str(path)), path
    contents, samples = container.read(path)
    dropped: Dropped = []
    usable: list[Counted] = []
    for sample, raw in samples:
        if sample.fault:
            dropped.append((sample.fault, sample.key))
            continue
        members, crc = container.members_of(path.name, raw), zlib.crc32(raw)
        for variant in range(documents.variants(layout, members)):
            try:
                parsed = documents.parse(layout, members, key=sample.key, variant=variant)
                texts = _texts(parsed.parts, tokenizer)
            except BadSample as bad:
                dropped.append((bad.reason, sample.key))
                continue
            stored = b"" if tokens is None else ids.to_bytes(texts, ids.type_of(tokenizer.ids))
            if tokens is not None:
                tokens.write(stored)
            segments = sequences.segments(texts)
            counts = (parsed.skipped_images, _largest_unit(parsed.parts), zlib.crc32(stored))
            usable.append(Counted(sample, crc, variant, segments, *counts))
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
        token_bytes=None if tokens is None else tokens.tell(),
    )


def _texts(parts: documents.Parts, tokenizer: Tokenizer) -> Texts:
    """The texts of a document, if its images look like images and it has a text token or a unit."""
    for part in parts:
        if isinstance(part, bytes):
            images.check_header(part)
    texts = sequences.encode(parts, tokenizer)
    if not any(text is not None and len(text) for text in texts):
        raise BadSample("empty_text")
    return texts


def _largest_unit(parts: documents.Parts) -> int:
    return max((int(part.values.max()) for part in parts if isinstance(part, Units)), default=-1)


def _assemble(
    usable: list[Counted],
    *,
    layout: Layout,
    tokenizer: Tokenizer,
    shard_bytes: int,
    dropped: Dropped,
    token_bytes: int | None,
) -> ShardIndex:
    token_crc = np.array([each.token_crc for each in usable], np.uint32)
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
        token_bytes=token_bytes or 0,
        token_crc=NO_TOKENS if token_bytes is None else token_crc,
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
