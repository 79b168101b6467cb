"""The order of documents: a permutation of every source, and their interleaving by tokens.

Both are pure functions of (lengths, weights, seed), computed window by window: only the current
blocks of shards are held, and any place is reached at once.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.masking import SPAN_TOKENS

BLOCK_SHARDS = 8


def permutation(count: int, *, seed: int, stream: tuple[int, int, int]) -> np.ndarray:
    """int64[count]: the numbers 0 .. count-1 in an order that depends on (seed, stream) alone.

    It sorts raw Philox words, because numpy promises that these stay the same in every version,
    unlike the results of Generator.permutation. The low bits give way to the number itself: no two
    words are equal, so any sort gives the same order, and the fastest may be used.
    """
    philox = np.random.Philox(key=[seed, 0], counter=[0, *stream])
    numbers = np.uint64((1 << (count - 1).bit_length()) - 1)
    words = (philox.random_raw(count) & ~numbers) | np.arange(count, dtype=np.uint64)
    return (np.sort(words) & numbers).astype(np.int64)


@dataclass(frozen=True)
class Run:
    """Consecutive documents of an order with their pieces; n documents.

    source, shard, document  int32[n]    document is the place in its shard's index
    epoch                    int32[n]    how often the source was read to its end before
    length                   int32[n]    tokens of its pieces
    border                   int64[n+1]  document i has the pieces [border[i], border[i+1])
    start, stop, images, spans  int32[p] of pieces; those outside the borders are of others
    """

    source: np.ndarray
    shard: np.ndarray
    document: np.ndarray
    epoch: np.ndarray
    length: np.ndarray
    border: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    images: np.ndarray
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    @property
    def tokens(self) -> np.ndarray:
        """int32[p]: of every piece, with what its spans add."""
        return self.stop - self.start + SPAN_TOKENS * self.spans

    @property
    def of_documents(self) -> tuple[np.ndarray, ...]:
        """What there is of every document, in the order of the fields."""
        return self.source, self.shard, self.document, self.epoch, self.length

    @property
    def of_pieces(self) -> tuple[np.ndarray, ...]:
        """What there is of every piece, in the order of the fields."""
        return self.start, self.stop, self.images, self.spans

    def part(self, start: int, stop: int) -> "Run":
        """Documents [start, stop), without a copy."""
        border = self.border[start : max(start, min(stop, len(self))) + 1]
        of_documents = (column[start:stop] for column in self.of_documents)
        return _run(of_documents, border, self.of_pieces)

    def pick(self, order: np.ndarray) -> "Run":
        """The documents at the places `order`, with their pieces and no others."""
        pieces = np.diff(self.border)[order]
        border = np.concatenate([[0], np.cumsum(pieces)])
        there = np.arange(border[-1]) + np.repeat(self.border[order] - border[:-1], pieces)
        of_documents = (column[order] for column in self.of_documents)
        return _run(of_documents, border, (column[there] for column in self.of_pieces))


def _run(
    of_documents: Iterable[np.ndarray], border: np.ndarray, of_pieces: Iterable[np.ndarray]
) -> Run:
    source, shard, document, epoch, length = of_documents
    start, stop, images, spans = of_pieces
    return Run(source, shard, document, epoch, length, border, start, stop, images, spans)


def join(runs: list[Run]) -> Run:
    """The runs one after the other."""
    if len(runs) == 1:
        return runs[0]
    borders, parts, pieces = [np.zeros(1, np.int64)], [], 0
    for run in runs:
        first, last = int(run.border[0]), int(run.border[-1])
        borders.append(run.border[1:] - first + pieces)
        parts.append([column[first:last] for column in run.of_pieces])
        pieces += last - first
    of_documents = map(np.concatenate, zip(*(run.of_documents for run in runs), strict=True))
    of_pieces = map(np.concatenate, zip(*parts, strict=True))
    return _run(of_documents, np.concatenate(borders), of_pieces)


class SourceOrder:
    """All documents of one source, once per epoch, in an order of (seed, source, epoch).

    Shards are shuffled; their documents are shuffled within blocks of BLOCK_SHARDS shards, so that
    reads stay near each other and only the current blocks are held. `counts` are the documents
    of every shard; `read` gives those of some shards in an epoch, one shard after the other. The
    order ends after `limit` documents, None: never.
    """

    def __init__(
        self,
        counts: np.ndarray,
        *,
        read: Callable[[np.ndarray, int], Run],
        seed: int,
        source: int,
        limit: int | None,
    ) -> None:
        self.counts, self.read, self.seed, self.source = counts, read, seed, source
        self.documents, self.limit = int(counts.sum()), limit
        self._shards = lru_cache(maxsize=2)(self._shuffled_shards)
        self._block = lru_cache(maxsize=2)(self._shuffled_block)

    def take(self, count: int, *, consumed: int) -> Run:
        """`count` documents after the first `consumed`, fewer where the order ends."""
        stop = consumed + count
        if self.limit is not None:
            stop = max(consumed, min(stop, self.limit))
        runs = [self._after(consumed).part(0, stop - consumed)]
        while (consumed := consumed + len(runs[-1])) < stop:
            runs.append(self._after(consumed).part(0, stop - consumed))
        return join(runs)

    def _after(self, consumed: int) -> Run:
        """The rest of a block behind the first `consumed` documents."""
        epoch, place = divmod(consumed, self.documents)
        _, ends = self._shards(epoch)
        block = bisect_right(ends, place)
        run = self._block(epoch, block)
        return run.part(place - (ends[block - 1] if block else 0), len(run))

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Shards in the order of an epoch, and the documents up to the end of every full block."""
        shards = permutation(len(self.counts), seed=self.seed, stream=(epoch, self.source, 0))
        return shards, np.cumsum(self.counts[shards])[BLOCK_SHARDS - 1 :: BLOCK_SHARDS].tolist()

    def _shuffled_block(self, epoch: int, block: int) -> Run:
        shards = self._shards(epoch)[0][block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS]
        run = self.read(shards, epoch)
        return run.pick(
            permutation(len(run), seed=self.seed, stream=(epoch, self.source, block + 1))
        )


@dataclass(frozen=True)
class Taken:
    """What was consumed of every source, and where its share began to count.

    `origin` is the number of tokens at which a source's virtual time is 0.
    """

    documents: list[int]
    tokens: list[int]
    origin: list[int]


def window(
    orders: list[SourceOrder],
    weights: list[float],
    *,
    size: int,
    max_tokens: int | None,
    before: Taken,
) -> tuple[Run, Taken]:
    """The next `size` documents, with what is consumed after them; none when the stream ends.

    A document's place is the midpoint of its tokens within its source, divided by the source's
    weight (virtual time). Sorting by it gives every source its exact share of tokens with no draw.
    With weights 2 and 1, documents aa of 2 tokens and bbbb of 4:

        a: 0.5 1.5 2.5 3.5    b: 2 6        aa aa bbbb aa aa ...

    The stream ends with the first source that does; its last window may be short. So is one that
    would exceed `max_tokens`, but for its first document.
    """
    heads = [
        order.take(size, consumed=consumed)
        for order, consumed in zip(orders, before.documents, strict=True)
    ]
    if not all(len(head) for head in heads):
        return heads[0].pick(np.zeros(0, np.int64)), before
    spent = [np.cumsum(head.length, dtype=np.int64) for head in heads]
    times = [
        (2 * (tokens - origin) + 2 * sums - head.length) / (2 * weight)
        for head, sums, weight, tokens, origin in zip(
            heads, spent, weights, before.tokens, before.origin, strict=True
        )
    ]
    counts, first = _earliest(times, size=size)
    run = join([head.part(0, count) for head, count in zip(heads, counts, strict=True)])
    if max_tokens is not None:
        fitting = np.searchsorted(np.cumsum(run.length[first]), max_tokens, side="right")
        first = first[: max(1, int(fitting))]
    number = np.repeat(np.arange(len(heads)), counts)[first]
    taken = np.bincount(number, minlength=len(heads)).tolist()
    tokens = [
        int(sums[count - 1]) if count else 0 for sums, count in zip(spent, taken, strict=True)
    ]
    return run.pick(first), Taken(
        [n + more for n, more in zip(before.documents, taken, strict=True)],
        [n + more for n, more in zip(before.tokens, tokens, strict=True)],
        before.origin,
    )


def _earliest(times: list[np.ndarray], *, size: int) -> tuple[list[int], np.ndarray]:
    """How many of each ascending array belong to the first `size`, and the order of all these.

    An array that is shorter than `size` has ended: nothing behind its last time belongs to them.
    """
    ends = [time[-1] for time in times if len(time) < size]
    together = np.concatenate(times)
    if len(together) > size:
        ends.append(np.partition(together, size - 1)[size - 1])
    end = min(ends, default=np.inf)
    counts = [int(np.searchsorted(time, end, side="right")) for time in times]
    early = np.concatenate([time[:count] for time, count in zip(times, counts, strict=True)])
    return counts, np.argsort(early, kind="stable")[:size]
