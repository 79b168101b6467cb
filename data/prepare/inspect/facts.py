"""What the page shows: the plan of a corpus, and its first rows with what lies in them."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data.block import Blocks
from data.corpus import Corpus
from data.layout import Reader, build
from data.plan import Piece, RowPlan, plan_rows
from data.samples import BadSample
from data.tokenizer import Tokenizer
from data.units import Units
from nmm.batch import Modality, PackedBatch, allowed, two_way
from nmm.config import DataConfig, ImageAttention
from nmm.errors import UserError

MASK_PIXELS = 1024


@dataclass(frozen=True)
class Mark:
    """A sentinel by its number, in the place of a span and before it; None: the end of a span."""

    sentinel: int | None


@dataclass(frozen=True)
class Part:
    """Positions [start, stop) of a piece hold a text, units, an image uint8[H, W, 3], or a mark."""

    start: int
    stop: int
    content: str | Units | np.ndarray | Mark


@dataclass(frozen=True)
class DrawnPiece:
    """A piece that begins at position `start` of its row; `dropped` says why it is empty."""

    piece: Piece
    key: str
    start: int
    document_tokens: int
    parts: list[Part]
    dropped: str

    @property
    def tokens(self) -> int:
        return self.piece.tokens

    @property
    def moved(self) -> tuple[int, int] | None:
        """The positions [start, stop) of all spans at its end, with their marks; None without any.

        A sentinel that comes a second time stands before its span.
        """
        marks = (part for part in self.parts if isinstance(part.content, Mark))
        first = [mark.start for mark in marks if mark.content == Mark(0)]
        return (first[1], self.tokens) if first else None


@dataclass(frozen=True)
class DrawnRow:
    number: int
    pieces: list[DrawnPiece]


@dataclass(frozen=True)
class Mask:
    """Every `step`-th of L positions of one row: bool[L/step, L/step] pairs of query and key."""

    allowed: np.ndarray
    same_image: np.ndarray
    source: np.ndarray
    step: int


@dataclass(frozen=True)
class Facts:
    """What the page shows.

    fills    filled share of every planned row
    tokens   planned tokens of every source; dropped: what the index left out, by reason
    mask     of the row `masked`
    """

    corpus: Corpus
    config: DataConfig
    rows: list[DrawnRow]
    fills: list[float]
    tokens: list[int]
    dropped: list[Counter[str]]
    masked: int
    mask: Mask


def look(
    corpus: Corpus,
    config: DataConfig,
    *,
    rows: int,
    planned_rows: int,
    image_attention: ImageAttention = ImageAttention.block,
) -> Facts:
    """Plan `planned_rows` rows and read the documents of the first `rows` of them.

    The plan goes on to the end of a window, where the shares are exact, or of the corpus. Raises
    UserError.
    """
    plan: list[RowPlan] = []
    for row, state in plan_rows(corpus, config):
        plan.append(row)
        if len(plan) >= max(rows, planned_rows) and state.row == 0:
            break
    if not plan:
        raise UserError(
            "the corpus fills no row before its first source ends; add shards, or set "
            "data.repeat=true."
        )
    dropped = [Counter[str]() for _ in corpus.sources]
    for counts, source in zip(dropped, corpus.sources, strict=True):
        counts.update(reason for shard in source.shards for reason, _ in shard.index.dropped)
    reader, blocks = Reader(corpus, seed=config.seed), Blocks()
    batches = [
        build([row], reader=reader, row_tokens=config.row_tokens, blocks=blocks)
        for row in plan[:rows]
    ]
    drawn = [
        _draw(number, row, batch, reader=reader)
        for number, (row, batch) in enumerate(zip(plan, batches, strict=False))
    ]
    masked = _most_telling(batches)
    lengths = [sum(piece.tokens for piece in row) for row in plan]
    tokens = [0] * len(corpus.sources)
    for piece in (piece for row in plan for piece in row):
        tokens[piece.source] += piece.tokens
    return Facts(
        corpus=corpus,
        config=config,
        rows=drawn,
        fills=[length / config.row_tokens for length in lengths],
        tokens=tokens,
        dropped=dropped,
        masked=masked,
        mask=mask(batches[masked], image_attention=image_attention),
    )


def _most_telling(batches: list[PackedBatch]) -> int:
    """The row whose mask shows most: with images, of many sources, of many documents."""
    return max(
        range(len(batches)),
        key=lambda n: (
            bool(len(batches[n].pixels)),
            len(batches[n].source.unique()),
            len(batches[n].keys[0]),
        ),
    )


def mask(batch: PackedBatch, *, image_attention: ImageAttention) -> Mask:
    """The mask of the batch's first row, thinned to at most MASK_PIXELS positions."""
    step = -(-batch.document.shape[1] // MASK_PIXELS)
    two_way_image = two_way(batch.document[:1], batch.image[:1], attention=image_attention)
    document, image = batch.document[:1, ::step], two_way_image[:, ::step]
    same_image = (image[0, :, None] == image[0, None, :]) & (image[0, :, None] > 0)
    return Mask(
        allowed=(allowed(document, image)[0] & (document[0, :, None] > 0)).numpy(),
        same_image=same_image.numpy(),
        source=batch.source[0, ::step].numpy(),
        step=step,
    )


def _draw(number: int, row: RowPlan, batch: PackedBatch, *, reader: Reader) -> DrawnRow:
    """The pieces of a row with what lies in them; `batch` holds this row alone."""
    corpus, pieces, stop = reader.corpus, [], 0
    for piece in row:
        start, stop = stop, stop + piece.tokens
        shard = corpus.sources[piece.source].shards[piece.shard]
        document = reader.read(piece)
        dropped = document.reason if isinstance(document, BadSample) else ""
        parts = [] if dropped else _parts(batch, slice(start, stop), tokenizer=corpus.tokenizer)
        pieces.append(
            DrawnPiece(
                piece=piece,
                key=f"{shard.name}/{shard.index.key(piece.document)}",
                start=start,
                document_tokens=int(shard.lengths[piece.document]),
                parts=parts,
                dropped=dropped,
            )
        )
    return DrawnRow(number, pieces)


def _parts(batch: PackedBatch, here: slice, *, tokenizer: Tokenizer) -> list[Part]:
    """The texts, units, images and marks at the positions `here`, in order."""
    image, modality, ids = (
        column[0, here].numpy() for column in (batch.image, batch.modality, batch.tokens)
    )
    masks = tokenizer.ids.masks
    marks = (ids >= masks.end) & (ids < masks.first + masks.count) if masks else ids < 0
    changes = np.diff(image).astype(bool) | np.diff(modality.astype(int)).astype(bool)
    changes |= marks[1:] | marks[:-1]
    borders = [0, *(np.flatnonzero(changes) + 1).tolist(), len(image)]
    parts = []
    for start, stop in pairwise(borders):
        number, kind = int(image[start]), Modality(int(modality[start]))
        tokens = ids[start:stop].tolist()
        if masks and marks[start]:
            content = Mark(None if tokens[0] == masks.end else tokens[0] - masks.first)
        elif number:
            content = batch.pixels[number - 1].numpy()
        elif kind is Modality.text:
            content = tokenizer.decode(tokens)
        else:
            first = tokenizer.ids.units[kind].first
            content = Units(np.array(tokens) - first)
        parts.append(Part(start, stop, content))
    return parts
