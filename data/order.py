"""The order of documents: a permutation of every source, and their interleaving by tokens.

Both are pure functions of (lengths, weights, seed), computed window by window.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK_SHARDS = 8


def permutation(count: int, *, seed: int, stream: tuple[int, int, int]) -> np.ndarray:
    """int64[count]: the numbers 0 .. count-1 in an order that depends on (seed, stream) alone.

    It sorts raw Philox words, because numpy promises that these stay the same in every version,
    unlike the results of Generator.permutation.
    """
    philox = np.random.Philox(key=[seed, 0], counter=[0, *stream])
    return np.argsort(philox.random_raw(count), kind="stable")


@dataclass(frozen=True)
class Run:
    """Consecutive documents of an order; n of them.

    source, shard, document  int64[n]   document is the place in its shard's index
    length                   int64[n]   tokens
    """

    source: np.ndarray
    shard: np.ndarray
    document: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, where: np.ndarray | slice) -> "Run":
        return Run(self.source[where], self.shard[where], self.document[where], self.length[where])


def join(runs: list[Run]) -> Run:
    """The runs one after the other."""
    columns = [[run.source, run.shard, run.document, run.length] for run in runs]
    return Run(*(np.concatenate(column) for column in zip(*columns, strict=True)))


class SourceOrder:
    """All documents of one source, once per epoch, in an order of (seed, source, epoch).

    Shards are shuffled; their documents are shuffled within blocks of BLOCK_SHARDS shards, so that
    reads stay near each other and few blocks are ever held. `lengths` has one array per shard.
    """

    def __init__(self, lengths: Sequence[np.ndarray], *, seed: int, source: int) -> None:
        self.lengths, self.seed, self.source = lengths, seed, source
        self.counts = np.array([len(shard) for shard in lengths], np.int64)
        self.documents = int(self.counts.sum())
        self._shards = lru_cache(maxsize=2)(self._shuffled_shards)
        self._block = lru_cache(maxsize=4)(self._shuffled_block)

    def take(self, count: int, *, consumed: int, repeat: bool) -> Run:
        """`count` documents after the first `consumed`; without `repeat` from one epoch only."""
        stop = consumed + count if repeat else min(consumed + count, self.documents)
        runs = [self._empty()]
        while consumed < stop:
            epoch, place = divmod(consumed, self.documents)
            run = self._rest_of_block(epoch, place)[: stop - consumed]
            runs.append(run)
            consumed += len(run)
        return join(runs)

    def _rest_of_block(self, epoch: int, place: int) -> Run:
        _, ends = self._shards(epoch)
        block = bisect_right(ends, place)
        return self._block(epoch, block)[place - (ends[block - 1] if block else 0) :]

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Shards in the order of an epoch, and the documents up to the end of every full block."""
        shards = permutation(len(self.counts), seed=self.seed, stream=(epoch, self.source, 0))
        return shards, np.cumsum(self.counts[shards])[BLOCK_SHARDS - 1 :: BLOCK_SHARDS].tolist()

    def _shuffled_block(self, epoch: int, block: int) -> Run:
        shards = self._shards(epoch)[0][block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS]
        counts = self.counts[shards]
        run = Run(
            source=np.full(counts.sum(), self.source, np.int64),
            shard=np.repeat(shards, counts),
            document=np.concatenate([np.arange(count) for count in counts]),
            length=np.concatenate([self.lengths[shard] for shard in shards]).astype(np.int64),
        )
        return run[permutation(len(run), seed=self.seed, stream=(epoch, self.source, block + 1))]

    def _empty(self) -> Run:
        nothing = np.zeros(0, np.int64)
        return Run(nothing, nothing, nothing, nothing)


def windows(
    orders: list[SourceOrder],
    weights: list[float],
    *,
    size: int,
    repeat: bool,
    documents: list[int],
    tokens: list[int],
) -> Iterator[tuple[Run, list[int], list[int]]]:
    """Windows of `size` documents, each with the documents and tokens consumed after it.

    A document's place is the midpoint of its tokens within its source, divided by the source's
    weight (virtual time). Sorting by it gives every source its exact share of tokens with no draw.
    With weights 2 and 1, documents aa of 2 tokens and bbbb of 4:

        a: 0.5 1.5 2.5 3.5    b: 2 6        aa aa bbbb aa aa ...

    Without `repeat` the windows end with the first source that does; the last may be short.
    """
    while True:
        heads = [
            order.take(size, consumed=consumed, repeat=repeat)
            for order, consumed in zip(orders, documents, strict=True)
        ]
        times = [
            (2 * spent + 2 * np.cumsum(head.length) - head.length) / (2 * weight)
            for head, spent, weight in zip(heads, tokens, weights, strict=True)
        ]
        if not all(len(head) for head in heads):
            return
        ended = [time[-1] for head, time in zip(heads, times, strict=True) if len(head) < size]
        merged = np.concatenate(times)
        first = np.argsort(merged, kind="stable")[:size]
        first = first[merged[first] <= min(ended, default=np.inf)]
        window = join(heads)[first]
        places = [window.source == order.source for order in orders]
        documents = [n + int(at.sum()) for n, at in zip(documents, places, strict=True)]
        tokens = [n + int(window.length[at].sum()) for n, at in zip(tokens, places, strict=True)]
        yield window, documents, tokens
