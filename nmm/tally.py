"""Sums of a step by source and modality, whose margins are the per-token numbers of the logs.

Legend of shapes: B rows, L tokens of a row, S sources, K modalities, P labelled positions.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nmm.batch import Modality, PackedBatch
from nmm.config import UnitModality

LOSS, LABELS, TOKENS = range(3)


class Tally:
    """Sums by source and modality in `tables`, float64[3, S, K].

    They are the summed loss (nats) and the count of labelled positions by the label's modality,
    and the count of positions that are not padding by their own modality.
    """

    def __init__(self, tables: Tensor) -> None:
        self.tables = tables

    @classmethod
    def zeros(cls, num_sources: int, *, device: torch.device) -> "Tally":
        """An empty tally."""
        shape = (3, num_sources, len(Modality))
        return cls(torch.zeros(shape, dtype=torch.float64, device=device))

    def add(self, batch: PackedBatch, *, token_losses: Tensor, positions: Tensor) -> None:
        """Add a batch: fp32[P] losses at labelled positions, int64[P] their flat index in B*L."""
        cell = self._cells(batch.source, batch.modality)
        label_cell = self._cells(batch.source, batch.label_modality)[positions]
        used = (batch.modality != Modality.pad).flatten()
        flat = self.tables.view(3, -1)
        flat[LOSS].index_add_(0, label_cell, token_losses.double())
        flat[LABELS].index_add_(0, label_cell, torch.ones_like(token_losses, dtype=torch.float64))
        flat[TOKENS].index_add_(0, cell, used.double())

    def loss(self, *, source: int | None = None, modality: Modality | None = None) -> float | None:
        """Mean nats per labelled token of a margin; None where it has no labels."""
        part = self._part(source, modality)
        labels = part[LABELS].sum().item()
        return part[LOSS].sum().item() / labels if labels else None

    def count(
        self, table: int, *, source: int | None = None, modality: Modality | None = None
    ) -> int:
        """The LABELS or TOKENS of a margin."""
        return round(self._part(source, modality)[table].sum().item())

    def _part(self, source: int | None, modality: Modality | None) -> Tensor:
        sources = slice(None) if source is None else slice(source, source + 1)
        modalities = slice(None) if modality is None else slice(modality, modality + 1)
        return self.tables[:, sources, modalities]

    @staticmethod
    def _cells(source: Tensor, modality: Tensor) -> Tensor:
        return (source.long() * len(Modality) + modality.long()).flatten()


Row = dict[str, Any]


def loss_keys(tally: Tally, *, sources: Sequence[str], units: Iterable[UnitModality]) -> Row:
    """loss, loss/modality/NAME and loss/source/NAME of a tally; null where there are no labels.

    The modalities are text and those of `units`: patches are not predicted.
    """
    modalities = [Modality.text, *(Modality[unit.value] for unit in units)]
    return {
        "loss": tally.loss(),
        **{f"loss/modality/{m.name}": tally.loss(modality=m) for m in modalities},
        **{f"loss/source/{name}": tally.loss(source=i) for i, name in enumerate(sources)},
    }


def token_keys(
    tally: Tally, *, sources: Sequence[str], units: Iterable[UnitModality]
) -> dict[str, int]:
    """The keys tokens, tokens/modality/NAME and tokens/source/NAME of a tally.

    The modalities are text, image, and those of `units`.
    """
    modalities = {Modality.text, Modality.image, *(Modality[unit.value] for unit in units)}
    return {
        "tokens": tally.count(TOKENS),
        **{
            f"tokens/modality/{m.name}": tally.count(TOKENS, modality=m) for m in sorted(modalities)
        },
        **{
            f"tokens/source/{name}": tally.count(TOKENS, source=i) for i, name in enumerate(sources)
        },
    }


def mean(values: Sequence[float | None]) -> float | None:
    """The unweighted mean of the values that exist."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
