"""Rows planned from lengths alone: row r is a pure function of (fingerprint, config, seed, r)."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from data import augment, budget, index, masking, mixture, order, pack
from data.corpus import Corpus
from data.draws import Purpose, key
from data.mixture import Stage
from data.order import Run, SourceOrder, Taken
from data.pack import Cuts
from nmm.config import DataConfig, UnitModality


class Piece(NamedTuple):
    """Tokens [start, stop) of a document's sequence; source, shard, document: its place.

    `epoch` is how often its source was read to the end before. It was planned in window `window`,
    as one of `window_documents` documents. So many `spans` of it are masked (data/masking.py).
    """

    source: int
    shard: int
    document: int
    start: int
    stop: int
    epoch: int = 0
    window: int = 0
    window_documents: int = 0
    spans: int = 0

    @property
    def tokens(self) -> int:
        """Positions that it takes in a row."""
        return self.stop - self.start + masking.SPAN_TOKENS * self.spans


RowPlan = list[Piece]


@dataclass(frozen=True)
class StreamState:
    """Where the stream stands: `row` rows of window `window` are served.

    Before that window there were `rows` rows, and `documents` and `tokens` were consumed of every
    source. `stage` weight changes are made; each source's share counts from its token `origin`.
    """

    window: int
    row: int
    rows: int
    stage: int
    documents: list[int]
    tokens: list[int]
    origin: list[int]

    def to_dict(self) -> dict:
        """A small dictionary for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(stored: dict) -> "StreamState":
        return StreamState(**stored)

    @staticmethod
    def start(sources: int) -> "StreamState":
        return StreamState(0, 0, 0, 0, *([0] * sources for _ in range(3)))


class Window:
    """The planned rows of one window, as arrays; a row becomes Python objects when asked for."""

    def __init__(self, run: Run, *, before: StreamState, after: Taken, config: DataConfig) -> None:
        self.run, self.before, self.after = run, before, after
        self.owner = np.repeat(np.arange(len(run)), np.diff(run.border))
        rows = self._fill(row_tokens=config.row_tokens, max_images=config.max_row_images)
        rows = [rows[row] for row in pack.deal(self._tokens(rows)).tolist()]
        self.pieces = np.fromiter(chain.from_iterable(rows), np.int64, len(self.owner))
        self.border = np.concatenate([[0], np.cumsum([len(row) for row in rows])])

    def _fill(self, *, row_tokens: int, max_images: int | None) -> list[list[int]]:
        lengths, images = self.run.tokens, self.run.images
        if max_images is None:
            return pack.fill_rows(lengths, row_tokens)
        return budget.fill_rows_within(lengths, row_tokens, images=images, max_images=max_images)

    def _tokens(self, rows: list[list[int]]) -> np.ndarray:
        """int64[R, S]: tokens of every source in every row."""
        run, sources = self.run, int(self.run.source.max(initial=0)) + 1
        pieces = np.fromiter(chain.from_iterable(rows), np.int64, len(self.owner))
        row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        cell = row * sources + run.source[self.owner[pieces]]
        tokens = np.bincount(cell, run.tokens[pieces], minlength=len(rows) * sources)
        return tokens.astype(np.int64).reshape(len(rows), sources)

    def __len__(self) -> int:
        return len(self.border) - 1

    def row(self, number: int) -> RowPlan:
        pieces = self.pieces[self.border[number] : self.border[number + 1]]
        run, owner = self.run, self.owner[pieces]
        places = (run.source[owner], run.shard[owner], run.document[owner])
        columns = (*places, run.start[pieces], run.stop[pieces], run.epoch[owner])
        spans = run.spans[pieces].tolist()
        window = {"window": self.before.window, "window_documents": len(run)}
        lists = zip(*(column.tolist() for column in columns), strict=True)
        return [
            Piece(*values, **window, spans=count)
            for values, count in zip(lists, spans, strict=True)
        ]

    def state_after(self, number: int) -> StreamState:
        before, after = self.before, self.after
        if number + 1 < len(self):
            return replace(before, row=number + 1)
        rows = before.rows + len(self)
        places = (after.documents, after.tokens, after.origin)
        return StreamState(before.window + 1, 0, rows, before.stage, *places)


def plan_rows(
    corpus: Corpus, config: DataConfig, state: StreamState | None = None
) -> Iterator[tuple[RowPlan, StreamState]]:
    """Rows after `state` (None: the start), each with the state after it."""
    for window, row in plan_places(corpus, config, state):
        yield window.row(row), window.state_after(row)


def plan_places(
    corpus: Corpus, config: DataConfig, state: StreamState | None = None
) -> Iterator[tuple[Window, int]]:
    """The rows of `plan_rows` as (window, number in it), which cost nothing until asked for."""
    orders = [_order(corpus, source, config=config) for source in range(len(corpus.sources))]
    state = state or StreamState.start(len(orders))
    skip = state.row
    state = replace(state, row=0)
    while True:
        window = _plan_window(orders, corpus.stages, before=state, config=config)
        if not len(window):
            return
        for row in range(skip, len(window)):
            yield window, row
        state, skip = window.state_after(len(window) - 1), 0


def _plan_window(
    orders: list[SourceOrder],
    stages: list[Stage],
    *,
    before: StreamState,
    config: DataConfig,
) -> Window:
    """The window at `before`, after the weight changes that are due; it ends where the next is."""
    at, taken = before.stage, Taken(before.documents, before.tokens, before.origin)
    while at + 1 < len(stages) and stages[at + 1].row <= before.rows:
        taken = mixture.change_weights(taken, stages[at].weights)
        at += 1
    rows_left = stages[at + 1].row - before.rows if at + 1 < len(stages) else None
    run, after = order.window(
        orders,
        stages[at].weights,
        size=config.window_documents,
        max_tokens=None if rows_left is None else rows_left * config.row_tokens,
        before=taken,
    )
    now = replace(before, stage=at, origin=taken.origin)
    return Window(run, before=now, after=after, config=config)


def _order(corpus: Corpus, source: int, *, config: DataConfig) -> SourceOrder:
    chosen = corpus.sources[source]
    epochs = chosen.epochs(repeat=config.repeat)

    def read(shards: np.ndarray, epoch: int) -> Run:
        return read_shards(corpus, source, shards.tolist(), epoch=epoch, config=config)

    counts = chosen.documents_of_shards
    limit = None if epochs is None else math.ceil(epochs) * chosen.documents
    return SourceOrder(counts, read=read, seed=config.seed, source=source, limit=limit)


def read_shards(
    corpus: Corpus, source: int, shards: list[int], *, epoch: int, config: DataConfig
) -> Run:
    """The documents of some shards of a source in an epoch, one shard after the other."""
    opened = [corpus.sources[source].shards[shard] for shard in shards]
    counts = [len(shard.index) for shard in opened]
    lengths = np.concatenate([shard.lengths for shard in opened])
    if config.masking.mean_spans or (lengths > config.context_tokens).any():
        of_shards = dict(zip(shards, counts, strict=True))
        segments = index.join_segments([shard.index for shard in opened])
        cuts = _cut(corpus, source, of_shards, lengths, segments, epoch=epoch, config=config)
    else:
        images = np.concatenate([shard.index.image_counts for shard in opened])
        cuts = pack.uncut(lengths, images)
    added = masking.SPAN_TOKENS * np.add.reduceat(cuts.spans, cuts.border[:-1])
    return Run(
        source=np.full(len(lengths), source, np.int32),
        shard=np.repeat(np.array(shards, np.int32), counts),
        document=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        epoch=np.full(len(lengths), epoch, np.int32),
        length=lengths + added,
        border=cuts.border,
        start=cuts.start,
        stop=cuts.stop,
        images=cuts.images,
        spans=cuts.spans,
    )


def _cut(
    corpus: Corpus,
    source: int,
    counts: dict[int, int],
    lengths: np.ndarray,
    segments: tuple[np.ndarray, np.ndarray],
    *,
    epoch: int,
    config: DataConfig,
) -> Cuts:
    """The pieces of the documents of some shards, and how many spans of each are masked.

    `counts` are the documents of every shard, `segments` those of `index.join_segments`.
    """
    segment, border = segments
    is_text_first = _text_first(corpus, source, counts, epoch=epoch, config=config)
    image = border[:-1][is_text_first]  # a caption has two parts
    segment[[image, image + 1]] = segment[[image + 1, image]]
    layout = {
        "segment": segment,
        "border": border,
        "image_tokens": corpus.image.tokens,
        "context_tokens": config.context_tokens,
        "whole_units": corpus.sources[source].layout.modality is UnitModality.image,
    }
    if not config.masking.mean_spans:
        return pack.cut(lengths, **layout)
    place = {"seed": config.seed, "epoch": epoch, "source": source}
    keys = [
        key(Purpose.spans, **place, shard=shard, document=np.arange(count, dtype=np.uint64))
        for shard, count in counts.items()
    ]
    return masking.cut(lengths, keys=np.concatenate(keys), config=config.masking, **layout)


def _text_first(
    corpus: Corpus, source: int, counts: dict[int, int], *, epoch: int, config: DataConfig
) -> np.ndarray:
    """bool[N]: which documents of some shards are laid out text first; `counts` are theirs."""
    fraction = corpus.sources[source].text_first_fraction
    place = {"fraction": fraction, "seed": config.seed, "epoch": epoch, "source": source}
    parts = [
        augment.text_first(np.arange(count), **place, shard=shard)
        for shard, count in counts.items()
    ]
    return np.concatenate(parts)
