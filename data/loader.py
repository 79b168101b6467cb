"""The steps of one rank, built in worker processes, with the state of the stream beside them."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset

from data.block import Blocks, Parcel, pack, unpack
from data.corpus import Corpus
from data.layout import Reader, build
from data.plan import RowPlan, StreamState, plan_places, plan_rows
from data.workers import context, forking, outlive_signals, shielded
from nmm.batch import PackedBatch
from nmm.config import DataConfig, MaskingConfig
from nmm.errors import UserError

Plan = tuple[list[RowPlan], StreamState]
Built = tuple[Parcel | UserError, StreamState]


class Loader:
    """Iterates over the steps of one rank: (its micro-batches, the state of the stream after it).

    Micro-batch k of rank r in step s starts at row s * global_rows + (k * world + r) * micro_batch,
    so a step has the same rows for every number of ranks and every micro-batch. The state is the
    same on every rank; `state` continues after it.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: DataConfig,
        *,
        rank: int,
        world: int,
        micro_batch: int,
        workers: int,
        state: dict | None = None,
    ) -> None:
        if config.global_rows % (world * micro_batch):
            raise UserError(
                f"data.global_rows is {config.global_rows}, which {world} processes with "
                f"engine.micro_batch={micro_batch} cannot make; "
                f"choose a multiple of {world * micro_batch}."
            )
        self.corpus, self.config = corpus, config
        self.rank, self.world, self.micro_batch, self.workers = rank, world, micro_batch, workers
        self.state = None if state is None else StreamState.from_dict(state)

    def __iter__(self) -> Iterator[tuple[list[PackedBatch], dict]]:
        before = active_children()
        batches = self._batches()
        helpers = [child for child in active_children() if child not in before]
        per_step = self.config.global_rows // (self.world * self.micro_batch)
        try:
            while step := _next(batches, per_step, helpers=helpers):
                yield [_checked(batch) for batch, _ in step], step[-1][1].to_dict()
        finally:
            # Ends its processes now; collected as part of a cycle they hang for seconds.
            del batches
        raise AssertionError("the corpus has ended; Corpus.check_budget had to refuse this budget")

    def _batches(self) -> Iterator[Built]:
        loader = DataLoader(
            MicroBatches(self.corpus, self.config),
            sampler=Plans(self),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            worker_init_fn=partial(outlive_signals, parent=os.getpid()),
            multiprocessing_context=context() if self.workers else None,
            generator=torch.Generator(),  # else every iterator draws from the global generator
        )
        with forking(), shielded():
            return iter(loader)


class Plans:
    """The micro-batches of one rank as plans, with the state after their step; whole steps only."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Plan]:
        loader = self.loader
        places = plan_places(loader.corpus, loader.config, loader.state)
        per_step, size = loader.config.global_rows, loader.micro_batch
        while len(step := list(islice(places, per_step))) == per_step:
            window, last = step[-1]
            state = window.state_after(last)
            for start in range(loader.rank * size, per_step, loader.world * size):
                yield [window.row(row) for window, row in step[start : start + size]], state


class MicroBatches(Dataset):
    """Builds the batch of a plan; returns a UserError as a value, which the loader raises."""

    def __init__(self, corpus: Corpus, config: DataConfig) -> None:
        self.reader, self.row_tokens = Reader(corpus, seed=config.seed), config.row_tokens
        self.blocks = Blocks()

    def __getitem__(self, plan: Plan) -> Built:
        rows, state = plan
        try:
            batch = build(rows, reader=self.reader, row_tokens=self.row_tokens, blocks=self.blocks)
            return pack(batch), state
        except UserError as error:
            return error, state


def held_out_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    rows_per_source: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    masked: bool = False,
) -> list[tuple[str, Iterator[PackedBatch]]]:
    """(source name, its first `rows_per_source` rows as micro-batches) for every source.

    `corpus` is opened for the held-out split. Every source is planned and read as if there were no
    other, in an order that does not depend on data.seed, without repetition. Ranks get different
    rows and equally many micro-batches; empty rows fill up the last ones. Documents are in their
    order, also where training masks spans; `masked` asks for the objective of training instead.
    """
    fixed = replace(config, seed=0, repeat=False)
    if not masked:
        fixed = replace(fixed, masking=MaskingConfig())

    def batches(source: int) -> Iterator[PackedBatch]:
        alone = corpus.alone(source)
        rows = [row for row, _ in islice(plan_rows(alone, fixed), rows_per_source)]
        rows += [[]] * (-len(rows) % (world * micro_batch))
        reader, blocks = Reader(alone, seed=fixed.seed), Blocks()
        for start in range(rank * micro_batch, len(rows), world * micro_batch):
            chosen = rows[start : start + micro_batch]
            built = build(chosen, reader=reader, row_tokens=config.row_tokens, blocks=blocks)
            built.source.masked_fill_(built.document > 0, source)
            yield unpack(pack(built))

    return [(source.name, batches(number)) for number, source in enumerate(corpus.sources)]


def _next(batches: Iterator[Built], count: int, *, helpers: list[BaseProcess]) -> list[Built]:
    """The next `count` batches; raises UserError where one of the processes was killed."""
    try:
        return list(islice(batches, count))
    except (RuntimeError, EOFError, ConnectionError):  # what torch raises depends on the moment
        for helper in helpers:
            with suppress(RuntimeError):  # torch's handler of SIGCHLD, wherever we are
                helper.join(timeout=0.1)
            if (code := helper.exitcode or 0) < 0:
                raise UserError(
                    f"a process that reads data was killed by signal {-code}, most often "
                    f"for its memory or for a lack of shared memory (/dev/shm); give the job more "
                    f"of both, or lower data.workers."
                ) from None
        raise


def _checked(parcel: Parcel | UserError) -> PackedBatch:
    if isinstance(parcel, UserError):
        raise parcel
    return unpack(parcel)


def _unchanged(item: object) -> object:
    return item
