"""What routers did, as sums over tokens, and the keys of the logs that are made of them.

Legend of shapes: Y layers with experts, Z layers that take some tokens, K modalities, E
experts of a layer.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nmm.batch import Modality
from nmm.config import MoDConfig, MoEConfig

# The columns of a layer's table behind those of its E experts, float32[K, E + 8]: sums over the
# tokens of a modality. The first E count the tokens that each expert took. Of auxiliary routers the
# next four count the choices that they were to guess, their guesses, and those that were right, and
# sum their loss.
WANTED, GUESSED, RIGHT, SURPRISE, TOKENS, DROPPED, ENTROPY, BALANCE = range(-8, 0)
MORE_COLUMNS = 8
# The columns of the table of a layer that takes some tokens, float32[K, 6], likewise. The first
# four are those of its auxiliary router; then the tokens it took, and those it chose among.
KEPT, SEEN = -2, -1
KEPT_COLUMNS = 6


class Routed:
    """Sums of a step in `tables`, float64[Y, K, E + 8], which `add_over_ranks` adds up."""

    def __init__(self, tables: Tensor) -> None:
        self.tables = tables

    @classmethod
    def zeros(cls, *, shape: torch.Size | tuple[int, ...], device: torch.device) -> "Routed":
        return cls(torch.zeros(shape, dtype=torch.float64, device=device))

    def add(self, statistics: Tensor) -> None:
        """Add a micro-batch, float32[Y, K, E + 8]."""
        self.tables += statistics

    def keys(self, config: MoEConfig) -> dict[str, Any]:
        """The keys moe/... of losses.jsonl (docs/scaling.md): means over tokens and layers.

        What a way of routing does not have is None.
        """
        sums = self.tables.sum(dim=(0, 1))[-MORE_COLUMNS:].tolist()
        tokens = max(sums[TOKENS], 1)
        balances = config.has_router and not config.chooses_tokens
        return {
            "moe/balance": sums[BALANCE] / tokens if balances else None,
            "moe/dropped_fraction": sums[DROPPED] / tokens,
            "moe/entropy": sums[ENTROPY] / tokens if config.has_router else None,
            **(self.auxiliary_keys() if config.auxiliary_routers else {}),
        }

    def signals(self, config: MoEConfig) -> dict[str, Any]:
        """The keys signals/... of losses.jsonl: by layer, of the modalities that were there.

        The load of a modality is a list, so that there are as many keys for any number of experts:
        of those that may take it the fraction of its tokens that each took, rounded to 1e-4.
        """
        found: dict[str, Any] = {}
        for layer, table in enumerate(self.tables.tolist()):
            for modality, row in enumerate(table):
                tokens, where = row[TOKENS], f"{layer}/{Modality(modality).name}"
                if not tokens:
                    continue
                taken = row[slice(*_experts_of(Modality(modality), config))]
                found[f"signals/load/{where}"] = [round(count / tokens, 4) for count in taken]
                found[f"signals/dropped_fraction/{where}"] = row[DROPPED] / tokens
                if config.has_router:
                    found[f"signals/entropy/{where}"] = row[ENTROPY] / tokens
        return found

    def auxiliary_keys(self) -> dict[str, Any]:
        """How auxiliary routers guess, over all experts, layers and tokens."""
        sums = self.tables.sum(dim=(0, 1))[-MORE_COLUMNS:].tolist()
        return _auxiliary_keys("moe", sums, tokens=sums[TOKENS])


class Kept:
    """Of layers that take some tokens only: sums in `tables`, float64[Z, K, 6], as in `Routed`."""

    def __init__(self, tables: Tensor) -> None:
        self.tables = tables

    @classmethod
    def zeros(cls, *, shape: torch.Size | tuple[int, ...], device: torch.device) -> "Kept":
        return cls(torch.zeros(shape, dtype=torch.float64, device=device))

    def add(self, statistics: Tensor) -> None:
        """Add a micro-batch, float32[Z, K, 6]."""
        self.tables += statistics

    def keys(self, config: MoDConfig) -> dict[str, Any]:
        """The keys mod/... of losses.jsonl (docs/scaling.md): means over tokens and layers."""
        by_kind = self.tables.sum(dim=0)[:, [KEPT, SEEN]].tolist()
        return {
            **{
                f"mod/kept_fraction/modality/{modality.name}": by_kind[modality][0] / seen
                for modality in Modality
                if (seen := by_kind[modality][1])
            },
            **(self.auxiliary_keys() if config.auxiliary_router else {}),
        }

    def signals(self, config: MoDConfig) -> dict[str, float]:
        """The key signals/kept_fraction/... of losses.jsonl, likewise by layer and modality."""
        assert config.every is not None
        return {
            f"signals/kept_fraction/{number * config.every}/{modality.name}": row[KEPT] / row[SEEN]
            for number, table in enumerate(self.tables.tolist())
            for modality, row in zip(Modality, table, strict=True)
            if row[SEEN]
        }

    def auxiliary_keys(self) -> dict[str, Any]:
        """How auxiliary routers guess, over all layers and tokens."""
        sums = self.tables.sum(dim=(0, 1)).tolist()
        return _auxiliary_keys("mod", sums, tokens=sums[SEEN])


def _experts_of(modality: Modality, config: MoEConfig) -> tuple[int, int]:
    """The number of the first expert that may take the modality, and that behind the last."""
    if "all" in config.sizes:
        return 0, config.total_experts
    ends = dict(zip(config.sizes, accumulate(config.sizes.values()), strict=True))
    return ends[modality.name] - config.sizes[modality.name], ends[modality.name]


def _auxiliary_keys(prefix: str, sums: list[float], *, tokens: float) -> dict[str, Any]:
    """Of sums whose first columns are those of auxiliary routers."""
    wanted, guessed, right, surprise = sums[:4]
    return {
        f"{prefix}/auxiliary/loss": surprise / max(tokens, 1),
        f"{prefix}/auxiliary/precision": right / guessed if guessed else None,
        f"{prefix}/auxiliary/recall": right / wanted if wanted else None,
        f"{prefix}/auxiliary/load": guessed / wanted if wanted else None,
    }
