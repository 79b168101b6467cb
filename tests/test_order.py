"""Every document once per epoch, every source its exact share of tokens, and no order twice."""

import hashlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from data import mixture
from data.mixture import Stage
from data.order import BLOCK_SHARDS, Run, SourceOrder, Taken, permutation, window

Lengths = list[np.ndarray]


def shards(seed: int, *, count: int = 20, most: int = 40, longest: int = 100) -> Lengths:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, longest, rng.integers(1, most)).astype(np.int32) for _ in range(count)]


def source_order(
    lengths: Lengths, *, seed: int = 5, source: int = 0, limit: int | None = None
) -> SourceOrder:
    """The order of documents that are one piece each."""

    def read(chosen: np.ndarray, epoch: int) -> Run:
        length = np.concatenate([lengths[shard] for shard in chosen])
        counts = [len(lengths[shard]) for shard in chosen]
        return Run(
            source=np.full(len(length), source, np.int32),
            shard=np.repeat(chosen, counts),
            document=np.concatenate([np.arange(count) for count in counts]),
            epoch=np.full(len(length), epoch, np.int32),
            length=length,
            border=np.arange(len(length) + 1),
            start=np.zeros_like(length),
            stop=length,
            images=np.zeros_like(length),
            spans=np.zeros_like(length),
        )

    counts = np.array([len(shard) for shard in lengths])
    return SourceOrder(counts, read=read, seed=seed, source=source, limit=limit)


def windows(
    orders: list[SourceOrder], weights: list[float], *, size: int, before: Taken | None = None
) -> Iterator[tuple[Run, Taken]]:
    nothing = [0] * len(orders)
    taken = before or Taken(nothing, nothing, nothing)
    while True:
        run, taken = window(orders, weights, size=size, max_tokens=None, before=taken)
        if not len(run):
            return
        yield run, taken


def documents(run: Run) -> list[tuple[int, int, int]]:
    return list(zip(run.source.tolist(), run.shard.tolist(), run.document.tolist(), strict=True))


def everything(lengths: Lengths, source: int = 0) -> set[tuple[int, int, int]]:
    return {(source, s, d) for s, shard in enumerate(lengths) for d in range(len(shard))}


@pytest.mark.parametrize(
    "count", [1, BLOCK_SHARDS - 1, BLOCK_SHARDS, BLOCK_SHARDS + 1, 3 * BLOCK_SHARDS]
)
def test_every_document_once_per_epoch_and_epochs_differ(count: int) -> None:
    lengths = shards(0, count=count)
    order = source_order(lengths, seed=3)
    size = order.documents
    epochs = [documents(order.take(size, consumed=epoch * size)) for epoch in range(3)]
    for epoch in epochs:
        assert set(epoch) == everything(lengths)
        assert len(epoch) == size
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other_seed = source_order(lengths, seed=4).take(size, consumed=0)
    assert documents(other_seed) != epochs[0]


def test_the_order_does_not_depend_on_how_it_is_taken() -> None:
    lengths = shards(1)
    whole = source_order(lengths, source=2)
    size = whole.documents
    expected = documents(whole.take(2 * size, consumed=0))
    for step in (1, 7, 100, size + 1):
        order = source_order(lengths, source=2)
        found = [
            d for at in range(0, 2 * size, step) for d in documents(order.take(step, consumed=at))
        ]
        assert found[: 2 * size] == expected
    once = source_order(lengths, source=2, limit=size)
    assert documents(once.take(size, consumed=size - 5)) == expected[size - 5 : size]
    assert documents(once.take(size, consumed=size)) == []


def test_reads_stay_within_a_block_of_shards() -> None:
    lengths = [np.full(10, 5, np.int32)] * (4 * BLOCK_SHARDS)
    run = source_order(lengths).take(40 * BLOCK_SHARDS, consumed=0)
    blocks = run.shard.reshape(4, -1)
    assert [len(set(block.tolist())) for block in blocks] == [BLOCK_SHARDS] * 4
    assert all(len(set(block[:10].tolist())) > 1 for block in blocks)


def test_any_place_is_reached_by_reading_one_block() -> None:
    """A source that has served for a thousand epochs continues as fast as a new one."""
    lengths = shards(0, count=200)
    order = source_order(lengths)
    read: list[int] = []
    inner = order.read
    order.read = lambda chosen, epoch: read.extend(chosen.tolist()) or inner(chosen, epoch)
    place = 1000 * order.documents + order.documents // 2
    assert len(order.take(5, consumed=place)) == 5
    assert len(read) <= 2 * BLOCK_SHARDS


def test_the_order_is_pinned() -> None:
    """A change here is an ORDER BREAK: every run that resumes would see other rows."""
    lengths = [
        [np.arange(n + 5, dtype=np.int32) * 31 % (97 + source) + 3 for n in range(20)]
        for source in range(2)
    ]
    orders = [source_order(each, source=n) for n, each in enumerate(lengths)]
    run, _ = next(windows(orders, [2.0, 1.0], size=100))
    assert permutation(8, seed=1, stream=(2, 3, 4)).tolist() == PERMUTATION
    assert hashlib.sha256(str(documents(run)).encode()).hexdigest()[:16] == FIRST_WINDOW


PERMUTATION = [5, 1, 6, 2, 4, 7, 3, 0]
FIRST_WINDOW = "a46af50f9927423d"


def test_a_permutation_is_one() -> None:
    for count in (1, 2, 3, 64, 65, 5000):
        found = permutation(count, seed=0, stream=(0, 0, 0))
        assert sorted(found.tolist()) == list(range(count))


def different_sources() -> list[SourceOrder]:
    """Three sources whose documents differ 100-fold in length."""
    rng = np.random.default_rng(0)
    lengths = [
        [rng.integers(30, 60, 5000).astype(np.int32) for _ in range(12)],
        [rng.integers(300, 600, 2000).astype(np.int32) for _ in range(12)],
        [np.minimum(rng.lognormal(8, 1.0, 500), 60_000).astype(np.int32) + 3 for _ in range(12)],
    ]
    return [source_order(each, seed=1, source=n) for n, each in enumerate(lengths)]


@pytest.mark.parametrize("weights", [[0.45, 0.45, 0.10], [0.2, 0.2, 0.6]])
def test_token_shares_are_exact(weights: list[float]) -> None:
    """Within 0.1 % at 10M tokens."""
    stream = windows(different_sources(), weights, size=4096)
    tokens = next(taken.tokens for _, taken in stream if sum(taken.tokens) >= 10_000_000)
    shares = np.array(tokens) / sum(tokens)
    assert np.abs(shares - weights).max() < 0.001


def test_token_shares_are_exact_after_a_change_of_weights() -> None:
    """Each stage by itself, and no source jumps ahead or waits when the weights change."""
    orders = different_sources()
    stages = [[0.45, 0.45, 0.10], [0.1, 0.3, 0.6], [0.8, 0.1, 0.1]]
    taken = Taken([0] * 3, [0] * 3, [0] * 3)
    for number, weights in enumerate(stages):
        start = taken.tokens
        if number:
            taken = mixture.change_weights(taken, stages[number - 1])
        windows_served = []
        while sum(taken.tokens) - sum(start) < 10_000_000:
            before = taken.tokens
            _, taken = window(orders, weights, size=4096, max_tokens=None, before=taken)
            windows_served.append(np.array(taken.tokens) - before)
        served = np.array(taken.tokens) - start
        assert np.abs(served / served.sum() - weights).max() < 0.001
        first = windows_served[0]
        assert np.abs(first - np.array(weights) * first.sum()).max() <= 60_000


def test_asked_and_reach_are_inverse() -> None:
    stages = [Stage(0, [1.0, 3.0]), Stage(10, [3.0, 1.0]), Stage(30, [1.0, 1.0])]
    assert mixture.asked(stages, tokens=5000, row_tokens=100) == [
        250 + 1500 + 1000,
        750 + 500 + 1000,
    ]
    for tokens in (1, 999, 1000, 1001, 2999, 3000, 50_000):
        for source, asked in enumerate(mixture.asked(stages, tokens=tokens, row_tokens=100)):
            back = mixture.reach(stages, source=source, supply=asked, row_tokens=100)
            assert back == pytest.approx(tokens)


def test_windows_continue_exactly_and_conserve_documents() -> None:
    lengths = [shards(0), shards(1, longest=1000)]

    def stream(before: Taken | None) -> list[tuple[Run, Taken]]:
        orders = [source_order(each, source=n) for n, each in enumerate(lengths)]
        return list(islice(windows(orders, [1.0, 3.0], size=64, before=before), 20))

    uninterrupted = stream(None)
    for at in (0, 3, 11):
        resumed = stream(uninterrupted[at][1])
        for (mine, taken), (theirs, expected) in zip(
            resumed, uninterrupted[at + 1 :], strict=False
        ):
            assert (documents(mine), taken) == (documents(theirs), expected)
    served = [d for run, _ in uninterrupted for d in documents(run)]
    for source in (0, 1):
        mine = [d for d in served if d[0] == source]
        assert len(mine) == uninterrupted[-1][1].documents[source]
        total = sum(len(shard) for shard in lengths[source])
        assert len(set(mine[:total])) == min(total, len(mine))


@pytest.mark.parametrize("size", [1, 10, 64, 10_000])
def test_the_stream_ends_with_its_first_source(size: int) -> None:
    """The end does not depend on the window, nothing comes too often, the shares hold."""
    lengths = [shards(0, count=4), shards(1, count=9)]
    orders = [source_order(each, source=n) for n, each in enumerate(lengths)]
    orders = [
        source_order(each, source=n, limit=order.documents)
        for n, (each, order) in enumerate(zip(lengths, orders, strict=True))
    ]
    stream = list(windows(orders, [1.0, 1.0], size=size))
    served = [d for run, _ in stream for d in documents(run)]
    assert len(set(served)) == len(served)
    assert everything(lengths[0]) <= set(served)
    tokens = stream[-1][1].tokens
    assert tokens[0] == sum(int(shard.sum()) for shard in lengths[0])
    assert abs(tokens[0] - tokens[1]) <= 100
