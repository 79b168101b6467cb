"""Planned rows become a batch: documents are read, decoded, and laid out as in nmm/batch.py."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from data import augment, container, documents, images, masking, sequences
from data.block import Blocks, Part
from data.corpus import Corpus
from data.documents import Parts
from data.draws import Purpose, key
from data.plan import Piece, RowPlan
from data.samples import BadSample
from data.sequences import Sequence, Texts
from data.source import Shard
from data.tokenizer import Tokenizer
from data.units import Units
from nmm.batch import COUNTS, NO_LABEL, Dropped, Modality, PackedBatch
from nmm.config import Kind
from nmm.errors import UserError

DOCUMENTS_KEPT, KEPT_BYTES = 64, 1 << 28


@dataclass(frozen=True)
class Document:
    """A document that was read: its tokens, and pixels uint8[side, side, 3] of every image."""

    sequence: Sequence
    pixels: list[np.ndarray]
    skipped_images: int

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*vars(self.sequence).values(), *self.pixels))


def build(rows: list[RowPlan], *, reader: "Reader", row_tokens: int, blocks: Blocks) -> PackedBatch:
    """The batch of planned rows, in one of the `blocks`; raises UserError.

    A document that turns out bad keeps its place as padding; its first piece lists it.
    """
    page = Page(len(rows), row_tokens, corpus=reader.corpus)
    for row, pieces in enumerate(rows):
        stop = 0
        for piece in pieces:
            start, stop = stop, stop + piece.tokens
            found = reader.read(piece)
            if isinstance(found, Document):
                part = reader.part(found, piece)
                page.draw(found, part, piece=piece, row=row, here=slice(start, stop))
            else:
                page.leave_out(piece, reason=found.reason)
    return page.batch(blocks)


class Reader:
    """Reads the documents of pieces and remembers the last ones, because pieces of one come again.

    The pieces of a long document lie in many rows of a window; to read it for each of them would
    cost the square of its length. Together they take at most KEPT_BYTES, or are one. `seed` is
    that of the plan.
    """

    def __init__(self, corpus: Corpus, *, seed: int) -> None:
        self.corpus, self.seed = corpus, seed
        self._kept: OrderedDict[tuple[int, ...], Document | BadSample] = OrderedDict()
        self._bytes = 0

    def read(self, piece: Piece) -> Document | BadSample:
        """The whole document of a piece, or why there is none; raises UserError."""
        place = (piece.source, piece.shard, piece.document, piece.epoch)
        if place not in self._kept:
            self._kept[place] = found = _read(piece, corpus=self.corpus, seed=self.seed)
            self._bytes += found.nbytes if isinstance(found, Document) else 0
            while len(self._kept) > (DOCUMENTS_KEPT if self._bytes <= KEPT_BYTES else 1):
                _, gone = self._kept.popitem(last=False)
                self._bytes -= gone.nbytes if isinstance(gone, Document) else 0
        self._kept.move_to_end(place)
        return self._kept[place]

    def part(self, document: Document, piece: Piece) -> Sequence:
        """The tokens of a piece in the order in which they stand in its row."""
        part = document.sequence.part(piece.start, piece.stop)
        if not piece.spans:
            return part
        masks = self.corpus.tokenizer.ids.masks
        assert masks is not None
        drawn_with = key(
            Purpose.spans,
            document=piece.document,
            seed=self.seed,
            epoch=piece.epoch,
            source=piece.source,
            shard=piece.shard,
        )
        spans = masking.spans_of(drawn_with, part, start=piece.start, count=piece.spans)
        return masking.masked(part, spans, ids=masks)


class Page:
    """The arrays of one batch, all padding at first."""

    def __init__(self, rows: int, row_tokens: int, *, corpus: Corpus) -> None:
        shape = (rows, row_tokens)
        self.corpus = corpus
        self.tokens = np.full(shape, corpus.tokenizer.ids.pad, np.int64)
        self.labels = np.full(shape, NO_LABEL, np.int64)
        self.document, self.image, self.position = (np.zeros(shape, np.int32) for _ in range(3))
        self.modality, self.label_modality, self.source = (
            np.zeros(shape, np.uint8) for _ in range(3)
        )
        self.counting = np.arange(row_tokens, dtype=np.int32)
        self.pixels: list[np.ndarray] = []
        self.keys: list[list[str]] = [[] for _ in range(rows)]
        self.dropped: list[Dropped] = []
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)

    def draw(
        self, document: Document, part: Sequence, *, piece: Piece, row: int, here: slice
    ) -> None:
        """Put a piece, whose tokens are `part`, at the positions `here` of a row.

        It becomes the row's next document.
        """
        self.keys[row].append(_key(piece, corpus=self.corpus))
        self.counts["pieces"] += 1
        if piece.start == 0:
            self.counts["documents"] += 1
            self.counts["cut_documents"] += piece.stop < len(document.sequence.tokens)
            self.counts["skipped_images"] += document.skipped_images
        self.tokens[row, here] = part.tokens
        self.labels[row, here] = part.labels
        self.modality[row, here] = part.modality
        self.label_modality[row, here] = part.label_modality
        self.source[row, here] = piece.source
        self.document[row, here] = len(self.keys[row])
        self.position[row, here] = self.counting[: piece.tokens]
        if document.pixels:
            self._place_images(document, part.image, row=row, here=here)

    def leave_out(self, piece: Piece, *, reason: str) -> None:
        """Count a piece of a document that could not be read; the first one lists the document."""
        self.counts["padded_tokens"] += piece.tokens
        if piece.start == 0:
            self.dropped.append(_dropped(piece, corpus=self.corpus, reason=reason))

    def _place_images(
        self, document: Document, in_document: np.ndarray, *, row: int, here: slice
    ) -> None:
        """`in_document` are a piece's 1-based numbers of the document's images, 0 for text.

        They follow each other in the document; in a masked piece some come behind later ones.
        """
        is_image = in_document > 0
        numbers = in_document[is_image]
        if not len(numbers):
            return
        first, last = int(numbers.min()), int(numbers.max())
        self.image[row, here][is_image] = numbers + (len(self.pixels) + 1 - first)
        self.pixels += document.pixels[first - 1 : last]

    def batch(self, blocks: Blocks) -> PackedBatch:
        arrays = {
            "tokens": self.tokens,
            "labels": self.labels,
            "document": self.document,
            "image": self.image,
            "position": self.position,
            "modality": self.modality,
            "label_modality": self.label_modality,
            "source": self.source,
        }
        side = self.corpus.image.side_pixels
        parts = [
            *(
                Part(name, torch.from_numpy(array).dtype, array.shape)
                for name, array in arrays.items()
            ),
            Part("pixels", torch.uint8, (len(self.pixels), side, side, 3)),
        ]
        tensors = blocks.tensors(parts)
        for name, array in arrays.items():
            tensors[name].numpy()[:] = array
        if self.pixels:
            np.stack(self.pixels, out=tensors["pixels"].numpy())
        return PackedBatch(**tensors, keys=self.keys, dropped=self.dropped, counts=self.counts)


def read_document(shard: Shard, number: int) -> dict[str, bytes]:
    """Extension -> bytes of the members of a shard's document; raises UserError."""
    place = shard.index
    start, stop, crc = (int(column[number]) for column in (place.start, place.stop, place.crc))
    return container.document_bytes(shard.path, start=start, stop=stop, crc=crc, store=shard.store)


def _parts(shard: Shard, number: int) -> Parts:
    """The parts of a shard's document; raises BadSample and UserError."""
    index = shard.index
    members, variant = read_document(shard, number), int(index.variant[number])
    return documents.parse(index.layout, members, key=index.key(number), variant=variant).parts


def _texts(parts: Parts, shard: Shard, number: int, *, tokenizer: Tokenizer) -> Texts:
    """The ids of a document's texts, stored or made now; None for an image, units as they are."""
    if shard.ids is None:
        return sequences.encode(parts, tokenizer)
    stored = shard.ids.texts(number, index=shard.index, store=shard.store)
    if not parts:  # nothing was parsed: there is only text
        return stored
    pairs = zip(parts, stored, strict=True)
    return [part if isinstance(part, Units) else text for part, text in pairs]


def _read(piece: Piece, *, corpus: Corpus, seed: int) -> Document | BadSample:
    """The whole document of a piece: one bad image drops all of its pieces. Raises UserError."""
    source = corpus.sources[piece.source]
    shard, number = source.shards[piece.shard], piece.document
    only_ids = shard.ids is not None and source.kind is Kind.text
    place = {"epoch": piece.epoch, "source": piece.source, "shard": piece.shard}
    try:
        parts = [] if only_ids else _parts(shard, number)
        stored = [part for part in parts if isinstance(part, bytes)]
        views = augment.views(corpus.augment, len(stored), document=number, seed=seed, **place)
        pixels = [
            images.decode(image, corpus.image.side_pixels, view=view)
            for image, view in zip(stored, views, strict=True)
        ]
    except BadSample as bad:
        return bad
    texts = _texts(parts, shard, number, tokenizer=corpus.tokenizer)
    if sequences.segments(texts).tolist() != shard.index.segments(number).tolist():
        raise UserError(
            f"{shard.path}: document {shard.index.key(number)} has other token counts "
            f"than its index says (was it indexed with another version of sentencepiece?); "
            f"run `python -m data.prepare.index` with --force."
        )
    text_first, fraction = False, source.text_first_fraction
    if fraction:
        (text_first,) = augment.text_first(
            np.array([number]), fraction=fraction, seed=seed, **place
        )
    ids, image_tokens = corpus.tokenizer.ids, corpus.image.tokens
    kind = source.layout.modality
    modality = Modality[kind.value] if kind else None
    in_order = texts[::-1] if text_first else texts
    sequence = sequences.sequence(in_order, ids, image_tokens=image_tokens, modality=modality)
    return Document(sequence, pixels, skipped_images=int(shard.index.skipped[number]))


def _key(piece: Piece, *, corpus: Corpus) -> str:
    shard = corpus.sources[piece.source].shards[piece.shard]
    return f"{shard.name}/{shard.index.key(piece.document)}"


def _dropped(piece: Piece, *, corpus: Corpus, reason: str) -> Dropped:
    source = corpus.sources[piece.source]
    shard = source.shards[piece.shard]
    return Dropped(
        source=source.name,
        shard=shard.name,
        key=shard.index.key(piece.document),
        reason=reason,
        window=piece.window,
        window_documents=piece.window_documents,
    )
