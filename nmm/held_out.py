"""What held-out batches cost: sums, and the keys of evals.jsonl that are made of them.

A model whose experts choose among all tokens has two losses once it has auxiliary routers: one that
it could have when it writes token by token, and one that looks ahead.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from data.corpus import Corpus
from data.loader import held_out_batches
from nmm.batch import Dropped, Modality, PackedBatch
from nmm.config import DataConfig, ModelConfig, UnitModality
from nmm.model import Output
from nmm.parallel import World, add_over_ranks, gather_lists
from nmm.routing import KEPT_COLUMNS, MORE_COLUMNS, Kept, Routed
from nmm.tally import Row, Tally, loss_keys, mean

Forward = Callable[..., Output]  # (batch) or (batch, causal=True)
Between = Callable[[PackedBatch], None]
Sources = Iterable[tuple[str, Iterable[PackedBatch]]]  # the batches of each, by its name
AHEAD = "ahead/"  # of the keys of losses that look ahead, where there are others beside them


@dataclass(frozen=True)
class HeldOut:
    """Sums over batches.

    With auxiliary routers `tally` is of what they decide, `ahead` of the choices among all tokens,
    and `routed` and `kept` say how right they are; without, there is `tally` alone.
    """

    config: ModelConfig
    tally: Tally
    ahead: Tally | None = None
    routed: Routed | None = None
    kept: Kept | None = None

    @classmethod
    def zeros(cls, config: ModelConfig, *, num_sources: int, device: torch.device) -> "HeldOut":
        tally = Tally.zeros(num_sources, device=device)
        if not config.auxiliary_routers:
            return cls(config, tally)
        routed = kept = None
        if config.moe.auxiliary_routers:
            shape = (config.depth, len(Modality), config.moe.total_experts + MORE_COLUMNS)
            routed = Routed.zeros(shape=shape, device=device)
        if layers := config.mod.layers(config.depth):
            kept = Kept.zeros(shape=(layers, len(Modality), KEPT_COLUMNS), device=device)
        ahead = Tally.zeros(num_sources, device=device)
        return cls(config, tally, ahead, routed, kept)

    @torch.no_grad()
    def add(self, model: Forward, batch: PackedBatch) -> None:
        """Add a batch, which every process gives to its model as often as all others."""
        on_device = batch.to(self.tally.tables.device)
        output = model(on_device, causal=self.config.auxiliary_routers)
        self._add(self.tally, on_device, output)
        if self.routed:
            self.routed.add(output.routed)
        if self.kept:
            self.kept.add(output.kept)
        if self.ahead:
            self._add(self.ahead, on_device, model(on_device))

    def add_all(
        self, model: Forward, sources: Sources, *, between: Between | None = None
    ) -> list[Dropped]:
        """Add all batches, each given to `between` first; returns what was not readable."""
        dropped: list[Dropped] = []
        for batch in (batch for _, batches in sources for batch in batches):
            if between:
                between(batch)
            self.add(model, batch)
            dropped += batch.dropped
        return dropped

    @staticmethod
    def _add(tally: Tally, batch: PackedBatch, output: Output) -> None:
        tally.add(batch, token_losses=output.token_losses, positions=output.positions)

    def add_over_ranks(self) -> None:
        add_over_ranks(self.tally.tables)
        for more in (self.ahead, self.routed, self.kept):
            if more:
                add_over_ranks(more.tables)

    def row(self, corpus: Corpus, *, units: Iterable[UnitModality]) -> Row:
        """The keys of evals.jsonl (docs/scaling.md) that say what was lost, and if it is causal."""
        found = loss_by_kind(self.tally, corpus, units=units)
        if not self.config.looks_ahead:
            return found
        found["causal"] = self.ahead is not None
        if self.ahead:
            ahead = loss_by_kind(self.ahead, corpus, units=units)
            found |= {AHEAD + key: value for key, value in ahead.items()}
        for guesses in (self.routed, self.kept):
            found |= guesses.auxiliary_keys() if guesses else {}
        return found


def loss_by_kind(tally: Tally, corpus: Corpus, *, units: Iterable[UnitModality] = ()) -> Row:
    """`loss` is the unweighted mean over the kinds.

    This follows "Scaling Laws for Native Multimodal Models". The loss of a kind is that of all
    labelled tokens of its sources.
    """
    kinds = sorted({source.kind.value for source in corpus.sources})
    by_kind: dict[str, float | None] = {}
    for kind in kinds:
        members = [i for i, source in enumerate(corpus.sources) if source.kind.value == kind]
        by_kind[f"loss/kind/{kind}"] = Tally(tally.tables[:, members]).loss()
    names = [source.name for source in corpus.sources]
    return {
        **loss_keys(tally, sources=names, units=units),
        "loss": mean(list(by_kind.values())),
        **by_kind,
    }


def evaluate(
    model: torch.nn.Module,
    corpus: Corpus,
    data: DataConfig,
    *,
    config: ModelConfig,
    rows_per_source: int,
    micro_batch: int,
    world: World,
    between: Between | None = None,
) -> tuple[Row, list[Dropped]]:
    """The loss keys of evals.jsonl (docs/scaling.md), and the documents that could not be read.

    Every process takes part and gets both. Each gives every micro-batch to `between`
    first, as often as all others; what that raises ends the evaluation.
    """
    model.eval()
    sources = held_out_batches(
        corpus,
        data,
        rows_per_source=rows_per_source,
        micro_batch=micro_batch,
        rank=world.rank,
        world=world.size,
    )
    sums = HeldOut.zeros(config, num_sources=len(corpus.sources), device=world.device)
    dropped = sums.add_all(model, sources, between=between)
    sums.add_over_ranks()
    model.train()
    return sums.row(corpus, units=data.units), gather_lists(dropped)


def objective(data: DataConfig, *, masked: bool = False) -> Row:
    """Which objective was scored, where training masks spans: documents in their order, or its own.

    Absent otherwise: there is only one.
    """
    if not data.masking.mean_spans:
        return {}
    return {"objective": "causal_masked" if masked else "causal"}
