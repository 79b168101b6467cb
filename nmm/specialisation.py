"""Which experts take which tokens of held-out rows, by layer and modality, as tables and a picture.

Legend of shapes: Y layers with experts, K modalities, E experts of a layer. A table is what
nmm/routing.py sums up, float64[Y, K, E + 8].

experts.csv          a line for every kind of documents, layer, modality and expert:
    tokens             of the modality that the expert took
    load               the same as a fraction of the modality's tokens
    entropy            of the router at tokens of the modality, in nats, whatever the expert;
                       empty without a router
    dropped_fraction   of the modality's tokens that no expert took
specialisation.csv   a line for every kind and layer, and with kind `all` for all together:
    specialisation     of the tokens that were counted
    normalised         the same as if there were equally many tokens of every modality
experts.png          both, drawn by nmm/plot/experts.py: the tokens of all, the scores of every kind
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.corpus import Corpus
from nmm.batch import Modality, PackedBatch
from nmm.config import MoEConfig
from nmm.errors import UserError
from nmm.model import Model
from nmm.plot.experts import LayerOfExperts, Scores, expert_figure
from nmm.routing import DROPPED, ENTROPY, MORE_COLUMNS, TOKENS, Routed
from nmm.trained import Trained

ALL = "all"
FIGURE, EXPERTS, SCORES = "experts.png", "experts.csv", "specialisation.csv"
Assigned = Mapping[str, Tensor]  # the tables of every kind of documents, and of all together


@dataclass(frozen=True)
class ExpertLine:
    """A line of experts.csv."""

    kind: str
    layer: int
    modality: str
    expert: int
    tokens: int
    load: float
    entropy: float | None
    dropped_fraction: float


@dataclass(frozen=True)
class ScoreLine:
    """A line of specialisation.csv."""

    kind: str
    layer: int
    specialisation: float | None
    normalised: float | None


def specialisation(taken: Tensor) -> float | None:
    """Mean over experts of 1 - H_b, from the tokens [K, E] that each took: 0 for alike, 1 for one.

    H_b is the entropy of an expert's split into modalities ("Scaling Laws for Native Multimodal
    Models", figure 12), in bits if there are two, else divided by the logarithm of their number.
    Modalities without tokens do not count, nor do experts without any. None if there is but one
    modality, or nothing was taken.
    """
    taken = taken[taken.sum(dim=1) > 0].double()
    by_expert = taken.sum(dim=0)
    if len(taken) < 2:
        return None
    split = taken[:, by_expert > 0] / by_expert[by_expert > 0]
    entropy = torch.special.entr(split).sum(dim=0) / math.log(len(taken))
    return float((1 - entropy).mean())


def normalised(table: Tensor) -> Tensor:
    """[K, E]: of a layer's table, the fraction of every modality's tokens that an expert took."""
    return table[:, :-MORE_COLUMNS] / table[:, TOKENS, None].clamp(min=1)


def of_run(trained: Trained, corpus: Corpus, *, rows_per_source: int) -> dict[str, Tensor]:
    """The tables of a run's held-out rows; raises UserError."""
    sources = trained.held_out_batches(corpus, rows_per_source=rows_per_source)
    kinds = (source.kind.value for source in corpus.sources)
    batches = [(kind, each) for kind, (_, each) in zip(kinds, sources, strict=True)]
    return assigned(trained.model, batches, device=next(trained.model.parameters()).device)


@torch.no_grad()
def assigned(
    model: Model, batches: Iterable[tuple[str, Iterable[PackedBatch]]], *, device: torch.device
) -> dict[str, Tensor]:
    """The tables of these batches, given with the kind of their documents; raises UserError."""
    config = model.config
    if not config.sparse:
        raise UserError(
            "--experts was given and model.moe.routing is none, so that there are no experts; "
            "leave it out, or give a run with experts."
        )
    shape = (config.depth, len(Modality), config.moe.total_experts + MORE_COLUMNS)
    sums = {ALL: Routed.zeros(shape=shape, device=device)}
    for kind, members in batches:
        of_kind = sums.setdefault(kind, Routed.zeros(shape=shape, device=device))
        for batch in members:
            routed = model(batch.to(device)).routed
            of_kind.add(routed)
            sums[ALL].add(routed)
    return {kind: each.tables.cpu() for kind, each in sums.items()}


def expert_lines(found: Assigned, config: MoEConfig) -> list[ExpertLine]:
    """Modalities that a kind does not have are left out."""
    return [
        ExpertLine(
            kind=kind,
            layer=layer,
            modality=Modality(modality).name,
            expert=expert,
            tokens=int(row[expert]),
            load=row[expert] / row[TOKENS],
            entropy=row[ENTROPY] / row[TOKENS] if config.has_router else None,
            dropped_fraction=row[DROPPED] / row[TOKENS],
        )
        for kind, tables in found.items()
        for layer, table in enumerate(tables.tolist())
        for modality, row in enumerate(table)
        if row[TOKENS]
        for expert in range(config.total_experts)
    ]


def score_lines(found: Assigned) -> list[ScoreLine]:
    return [
        ScoreLine(
            kind=kind,
            layer=layer,
            specialisation=specialisation(table[:, :-MORE_COLUMNS]),
            normalised=specialisation(normalised(table)),
        )
        for kind, tables in found.items()
        for layer, table in enumerate(tables)
    ]


def write(found: Assigned, config: MoEConfig, *, directory: Path, title: str) -> list[Path]:
    """The three files; their paths."""
    scores = score_lines(found)
    _write_csv(directory / EXPERTS, expert_lines(found, config))
    _write_csv(directory / SCORES, scores)
    expert_figure(
        _layers(found[ALL]),
        scores={
            kind: Scores(
                [line.specialisation for line in scores if line.kind == kind],
                [line.normalised for line in scores if line.kind == kind],
            )
            for kind in found
        },
        title=title,
        path=directory / FIGURE,
    )
    return [directory / name for name in (FIGURE, EXPERTS, SCORES)]


def _layers(tables: Tensor) -> list[LayerOfExperts]:
    there = [m for m in Modality if tables[:, m, TOKENS].sum() > 0]
    return [
        LayerOfExperts(
            fractions={
                m.name: (table[m, :-MORE_COLUMNS] / table[:, TOKENS].sum()).tolist() for m in there
            },
            dropped_fraction=float(table[:, DROPPED].sum() / table[:, TOKENS].sum()),
        )
        for table in tables
    ]


def _write_csv(path: Path, lines: Sequence[ExpertLine | ScoreLine]) -> None:
    rows = [asdict(line) for line in lines]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
