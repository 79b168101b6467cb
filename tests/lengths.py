"""Made-up lengths like those of web data, and index sets that hold nothing else."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from data import index, pack
from data.sequences import segment_tokens
from data.tokenizer import Tokenizer
from nmm.config import Kind, Layout

KINDS = (Kind.caption, Kind.interleaved, Kind.text)


def segments(
    kind: Kind, *, documents: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Segments and borders: captions of about 45 tokens, 1 to 8 pairs of image and text, prose."""
    if kind is Kind.text:
        words = np.clip(rng.lognormal(6.3, 1.2, documents), 5, 60_000)
        return words.astype(np.int32), np.arange(documents + 1)
    pairs = np.ones(documents, int) if kind is Kind.caption else rng.integers(1, 9, documents)
    mean, deviation = (3.6, 0.6) if kind is Kind.caption else (4.0, 1.0)
    segment = np.full(2 * pairs.sum(), -1, np.int32)
    segment[1::2] = np.clip(rng.lognormal(mean, deviation, pairs.sum()), 3, 4000)
    return segment, np.cumsum([0, *(2 * pairs)])


def pieces(mix: str, *, documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and images of the pieces of some documents in stream order, for "45-45-10"."""
    rng = np.random.default_rng(seed)
    times, found = [], []
    for kind, share in zip(KINDS, map(float, mix.split("-")), strict=True):
        segment, border = segments(kind, documents=documents, rng=rng)
        tokens = np.concatenate([[0], np.cumsum(segment_tokens(segment, 256))])
        lengths = (2 + np.diff(tokens[border])).astype(np.int32)
        cuts = pack.cut(
            lengths, segment=segment, border=border, image_tokens=256, context_tokens=1024
        )
        if share:
            times.append((np.cumsum(lengths) - lengths / 2) / share)
            both = np.stack([cuts.stop - cuts.start, cuts.images])
            found += [both[:, start:stop] for start, stop in pairwise(cuts.border)]
    first = np.argsort(np.concatenate(times), kind="stable")[:documents]
    sizes, images = np.concatenate([found[document] for document in first], axis=1)
    return sizes, images


def write_indexes(
    directory: Path, *, kind: Kind, shards: int, documents: int, tokenizer: Tokenizer
) -> None:
    """Empty shards of the right size with indexes of made-up lengths beside them."""
    directory.mkdir(parents=True)
    keys = b"".join(f"{key:09d}".encode() for key in range(documents))
    for number in range(shards):
        rng = np.random.default_rng([number, KINDS.index(kind)])
        segment, border = segments(kind, documents=documents, rng=rng)
        stop = 512 * np.cumsum(rng.integers(1, 200, documents))
        made = index.assemble(
            layout=Layout(kind),
            tokenizer_hash=tokenizer.hash,
            shard_bytes=int(stop[-1]),
            dropped=[],
            segment=segment,
            border=border,
            start=np.concatenate([[0], stop[:-1]]),
            stop=stop,
            variant=np.zeros(documents, np.int32),
            skipped=np.zeros(documents, np.int32),
            crc=np.zeros(documents, np.uint32),
            key_bytes=np.frombuffer(keys, np.uint8),
            key_border=9 * np.arange(documents + 1),
        )
        path = directory / f"{kind.value}-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(made.shard_bytes)
        made.save(path)
