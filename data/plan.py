"""Rows planned from lengths alone: row r is a pure function of (fingerprint, config, seed, r)."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from data import order, pack
from data.corpus import Corpus
from nmm.config import DataConfig

ROW_SHUFFLE = 2**63


class Piece(NamedTuple):
    """Tokens [start, stop) of a document's sequence; the others are places in the corpus."""

    source: int
    shard: int
    document: int
    start: int
    stop: int


RowPlan = list[Piece]


@dataclass(frozen=True)
class StreamState:
    """Where the stream stands: `row` rows of window `window` are served.

    `documents` and `tokens` were consumed of every source before that window.
    """

    window: int
    row: int
    documents: list[int]
    tokens: list[int]

    def to_dict(self) -> dict:
        """A small dictionary for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(stored: dict) -> "StreamState":
        return StreamState(**stored)


def plan_rows(
    corpus: Corpus,
    config: DataConfig,
    state: StreamState | None = None,
    *,
    only: Sequence[int] | None = None,
) -> Iterator[tuple[RowPlan, StreamState]]:
    """Rows after `state` (None: the start), each with the state after it; `only` picks sources."""
    sources = list(only) if only is not None else list(range(len(corpus.sources)))
    state = state or StreamState(0, 0, [0] * len(sources), [0] * len(sources))
    windows = order.windows(
        [_order(corpus, source, seed=config.seed) for source in sources],
        [corpus.sources[source].weight for source in sources],
        size=config.window_documents,
        repeat=config.repeat,
        documents=state.documents,
        tokens=state.tokens,
    )
    number, before, skip = state.window, (state.documents, state.tokens), state.row
    for run, documents, tokens in windows:
        rows = _pack(run, corpus=corpus, config=config, window=number)
        following = StreamState(number + 1, 0, documents, tokens)
        for row in range(skip, len(rows)):
            last = row + 1 == len(rows)
            yield rows[row], following if last else StreamState(number, row + 1, *before)
        number, before, skip = number + 1, (documents, tokens), 0


def _order(corpus: Corpus, source: int, *, seed: int) -> order.SourceOrder:
    lengths = [shard.lengths for shard in corpus.sources[source].shards]
    return order.SourceOrder(lengths, seed=seed, source=source)


def _pack(run: order.Run, *, corpus: Corpus, config: DataConfig, window: int) -> list[RowPlan]:
    """The rows of one window, shuffled, because best-fit puts like lengths into the same rows."""
    items = _pieces(run, corpus=corpus, config=config)
    rows = pack.best_fit([piece.stop - piece.start for piece in items], config.row_tokens)
    shuffled = order.permutation(len(rows), seed=config.seed, stream=(window, 0, ROW_SHUFFLE))
    return [[items[item] for item in rows[row]] for row in shuffled.tolist()]


def _pieces(run: order.Run, *, corpus: Corpus, config: DataConfig) -> list[Piece]:
    items: list[Piece] = []
    columns = (run.source, run.shard, run.document, run.length)
    for source, shard, document, length in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        if length <= config.context_tokens:
            items.append(Piece(source, shard, document, 0, length))
            continue
        segments = corpus.sources[source].shards[shard].index.segments(document)
        cuts = pack.pieces(
            segments, image_tokens=corpus.image.tokens, context_tokens=config.context_tokens
        )
        items += [Piece(source, shard, document, start, stop) for start, stop in cuts]
    return items
