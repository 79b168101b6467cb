"""What routers did, as sums over tokens, and the keys of the logs that are made of them.

Legend of shapes: Y layers with experts, K modalities, E experts of a layer.
"""

from typing import Any

import torch
from torch import Tensor

from nmm.config import MoEConfig

# The columns of a layer's table behind those of its E experts, float32[K, E + 8]: sums over the
# tokens of a modality. The first E count the tokens that each expert took. Of auxiliary routers the
# next four count the choices that they were to guess, their guesses, and those that were right, and
# sum their loss.
WANTED, GUESSED, RIGHT, SURPRISE, TOKENS, DROPPED, ENTROPY, BALANCE = range(-8, 0)
MORE_COLUMNS = 8


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

    def auxiliary_keys(self) -> dict[str, Any]:
        """How auxiliary routers guess, over all experts, layers and tokens."""
        sums = self.tables.sum(dim=(0, 1))[-MORE_COLUMNS:].tolist()
        wanted, guessed, right = sums[WANTED], sums[GUESSED], sums[RIGHT]
        return {
            "moe/auxiliary/loss": sums[SURPRISE] / max(sums[TOKENS], 1),
            "moe/auxiliary/precision": right / guessed if guessed else None,
            "moe/auxiliary/recall": right / wanted if wanted else None,
            "moe/auxiliary/load": guessed / wanted if wanted else None,
        }
