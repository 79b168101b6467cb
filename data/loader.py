"""Planned rows become batches: reading, decoding and laying out, in worker processes, with the state beside them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import documents, images, index
from data.corpus import Corpus
from data.documents import BadSample, Sequence
from data.plan import Piece, RowPlan, StreamState, plan_rows
from data.workers import context, forking
from nmm.batch import NO_LABEL, Dropped, Modality, PackedBatch
from nmm.config import DataConfig, ImageConfig
from nmm.errors import UserError

Plan = tuple[list[RowPlan], StreamState]


@dataclass(frozen=True)
class Document:
    """A document that was read: its tokens, and pixels uint8[side, side, 3] of every image."""

    sequence: Sequence
    pixels: list[np.ndarray]


class Loader:
    """Iterates over the optimizer steps of one rank: (its micro-batches, the state of the stream after the step).

    Micro-batch k of rank r in step s holds the rows s * global_rows + (k * world + r) * micro_batch and the
    next ones, so a step consumes the same rows for every number of ranks and every micro-batch. The state is the
    same on every rank; `state` continues after it.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: DataConfig,
        *,
        image: ImageConfig,
        rank: int,
        world: int,
        micro_batch: int,
        workers: int,
        state: dict | None = None,
    ) -> None:
        if config.global_rows % (world * micro_batch):
            raise UserError(
                f"data.global_rows is {config.global_rows}, which {world} processes with engine.micro_batch="
                f"{micro_batch} cannot make; choose a multiple of {world * micro_batch}."
            )
        assert image == corpus.image, f"the corpus was opened for {corpus.image}, not {image}"
        self.corpus, self.config = corpus, config
        self.rank, self.world, self.micro_batch, self.workers = rank, world, micro_batch, workers
        self.state = None if state is None else StreamState.from_dict(state)

    def __iter__(self) -> Iterator[tuple[list[PackedBatch], dict]]:
        batches = self._batches()
        per_step = self.config.global_rows // (self.world * self.micro_batch)
        while step := list(islice(batches, per_step)):
            for batch, _ in step:
                if isinstance(batch, UserError):
                    raise batch
            yield [batch for batch, _ in step], step[-1][1].to_dict()
        raise AssertionError("the corpus has ended; Corpus.check_budget had to refuse this budget")

    def _batches(self) -> Iterator[tuple[PackedBatch | UserError, StreamState]]:
        loader = DataLoader(
            MicroBatches(self.corpus, row_tokens=self.config.row_tokens),
            sampler=Plans(self),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            multiprocessing_context=context() if self.workers else None,
            generator=torch.Generator(),  # else every iterator draws from the global generator
        )
        with forking():
            iterator = iter(loader)
        return iterator


class Plans:
    """The micro-batches of one rank as plans, with the state after their step; ends with the last whole step."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Plan]:
        loader = self.loader
        planned = plan_rows(loader.corpus, loader.config, loader.state)
        size = loader.micro_batch
        while len(step := list(islice(planned, loader.config.global_rows))) == loader.config.global_rows:
            rows, state = [row for row, _ in step], step[-1][1]
            for start in range(loader.rank * size, len(rows), loader.world * size):
                yield rows[start : start + size], state


class MicroBatches(Dataset):
    """Builds the batch of a plan; an error that is the user's comes back as a value, to be raised by the loader."""

    def __init__(self, corpus: Corpus, *, row_tokens: int) -> None:
        self.corpus, self.row_tokens = corpus, row_tokens

    def __getitem__(self, plan: Plan) -> tuple[PackedBatch | UserError, StreamState]:
        rows, state = plan
        try:
            return build(rows, corpus=self.corpus, row_tokens=self.row_tokens), state
        except UserError as error:
            return error, state


def held_out_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    image: ImageConfig,
    rows_per_source: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
) -> list[tuple[str, Iterator[PackedBatch]]]:
    """(source name, its first `rows_per_source` rows as micro-batches) of a corpus opened for the held-out split.

    Every source is planned by itself, in an order that does not depend on data.seed, without repetition. Ranks get
    different rows and equally many micro-batches; empty rows fill up the last ones.
    """
    assert image == corpus.image, f"the corpus was opened for {corpus.image}, not {image}"
    fixed = replace(config, seed=0, repeat=False)

    def batches(source: int) -> Iterator[PackedBatch]:
        rows = [row for row, _ in islice(plan_rows(corpus, fixed, only=[source]), rows_per_source)]
        rows += [[]] * (-len(rows) % (world * micro_batch))
        for start in range(rank * micro_batch, len(rows), world * micro_batch):
            yield build(rows[start : start + micro_batch], corpus=corpus, row_tokens=config.row_tokens)

    return [(source.name, batches(number)) for number, source in enumerate(corpus.sources)]


def build(rows: list[RowPlan], *, corpus: Corpus, row_tokens: int) -> PackedBatch:
    """Read the documents of planned rows and lay them out as nmm/batch.py draws it; raises UserError."""
    shape = (len(rows), row_tokens)
    side = corpus.image.side_pixels
    tokens = np.full(shape, corpus.tokenizer.ids.pad, np.int64)
    labels = np.full(shape, NO_LABEL, np.int64)
    modality, source = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    document, image, position = (np.zeros(shape, np.int32) for _ in range(3))
    keys: list[list[str]] = [[] for _ in rows]
    dropped: list[Dropped] = []
    pixels: list[np.ndarray] = []
    read: dict[tuple[int, int, int], Document | BadSample] = {}
    for row, pieces in enumerate(rows):
        stop = 0
        for piece in pieces:
            start, stop = stop, stop + piece.stop - piece.start
            if piece[:3] not in read:
                read[piece[:3]] = _read(piece, corpus=corpus)
            found = read[piece[:3]]
            if isinstance(found, BadSample):
                dropped += [_dropped(piece, corpus=corpus, reason=found.reason)] * (piece.start == 0)
                continue
            keys[row].append(_key(piece, corpus=corpus))
            here, there = slice(start, stop), slice(piece.start, piece.stop)
            in_document = found.sequence.image[there]
            tokens[row, here] = found.sequence.tokens[there]
            labels[row, here] = found.sequence.labels[there]
            modality[row, here] = np.where(in_document > 0, Modality.image, Modality.text)
            source[row, here] = piece.source
            document[row, here] = len(keys[row])
            position[row, here] = np.arange(stop - start)
            if in_document.any():
                first, last = in_document[in_document > 0][[0, -1]]
                image[row, here] = np.where(in_document > 0, in_document - first + 1 + len(pixels), 0)
                pixels += found.pixels[first - 1 : last]
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        modality=torch.from_numpy(modality),
        source=torch.from_numpy(source),
        document=torch.from_numpy(document),
        image=torch.from_numpy(image),
        position=torch.from_numpy(position),
        labels=torch.from_numpy(labels),
        pixels=torch.from_numpy(np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8)),
        keys=keys,
        dropped=dropped,
    )


def _read(piece: Piece, *, corpus: Corpus) -> Document | BadSample:
    """The whole document of a piece, because one bad image drops all of its pieces; raises UserError."""
    source = corpus.sources[piece.source]
    shard = source.shards[piece.shard]
    place = shard.index
    members = index.document_bytes(
        shard.path,
        start=int(place.start[piece.document]),
        stop=int(place.stop[piece.document]),
        crc=int(place.crc[piece.document]),
    )
    try:
        parts = documents.parse(source.kind, members)
        pixels = [images.decode(part, corpus.image.side_pixels) for part in parts if isinstance(part, bytes)]
    except BadSample as bad:
        return bad
    sequence, segments = documents.sequence(parts, corpus.tokenizer, image_tokens=corpus.image.tokens)
    if not np.array_equal(segments, place.segments(piece.document)):
        raise UserError(
            f"{shard.path}: document {place.key(piece.document)} has other token counts than its index says (was "
            f"it indexed with another version of sentencepiece?); run `python -m data.prepare.index` with --force."
        )
    return Document(sequence, pixels)


def _key(piece: Piece, *, corpus: Corpus) -> str:
    shard = corpus.sources[piece.source].shards[piece.shard]
    return f"{shard.path.name}/{shard.index.key(piece.document)}"


def _dropped(piece: Piece, *, corpus: Corpus, reason: str) -> Dropped:
    source = corpus.sources[piece.source]
    shard = source.shards[piece.shard]
    return Dropped(source.name, shard.path.name, shard.index.key(piece.document), reason)


def _unchanged(item: tuple) -> tuple:
    return item
