"""Keys and values of what was read, so that one more token costs one column and not all of them.

Legend of shape suffixes: B rows, C columns of the cache, L tokens, H heads, E channels of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nmm.model.attention import Attends


@dataclass
class Layer:
    """Keys and values [B, C, H, E] of one layer; zero where nothing was read yet."""

    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))


class Cache:
    """What `depth` layers remember of rows that hold one document each, up to `columns` tokens.

    Two prompts, "b I I x" and "b y", in a cache of 6 columns; both write z:

        first the batch      b I I x . .      images see all of themselves, as in training
                             b y _ _ . .      what padding left is written over before it is seen
        then one token each  b I I x z .      z sees columns 0 .. 4
                             b y z _ . .      z sees columns 0 .. 2
    """

    def __init__(self, *, depth: int, columns: int) -> None:
        self.columns = columns
        self.layers = [Layer() for _ in range(depth)]

    def fill(self, plan: Attends) -> "Filling":
        """How all layers, one after the other, attend to a whole batch and remember it."""
        return Filling(plan, iter(self.layers), self.columns)

    def add(self, at_B: Tensor) -> "Adding":
        """How all layers, one after the other, attend from one more token, at column at[b]."""
        seen = int(at_B.max()) + 1
        assert seen <= self.columns, (seen, self.columns)
        seen_BC = torch.arange(seen, device=at_B.device) <= at_B[:, None]
        return Adding(iter(self.layers), at_B, seen_BC[:, None, None])


@dataclass(frozen=True)
class Filling:
    """Attends as `plan` does, and keeps the keys and values of all columns."""

    plan: Attends
    layers: Iterator[Layer]
    columns: int

    def attend(self, q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor) -> Tensor:
        layer = next(self.layers)
        room = (0, 0, 0, 0, 0, self.columns - k_BLHE.shape[1])
        layer.keys, layer.values = F.pad(k_BLHE, room), F.pad(v_BLHE, room)
        return self.plan.attend(q_BLHE, k_BLHE, v_BLHE)


@dataclass(frozen=True)
class Adding:
    """Attends from one token a row, at column at[b], to those `seen` bool[B, 1, 1, C]."""

    layers: Iterator[Layer]
    at: Tensor
    seen: Tensor

    def attend(self, q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor) -> Tensor:
        layer, rows = next(self.layers), torch.arange(len(self.at), device=self.at.device)
        layer.keys[rows, self.at] = k_BLHE[:, 0]
        layer.values[rows, self.at] = v_BLHE[:, 0]
        columns = self.seen.shape[-1]
        k_BHCE, v_BHCE = (x[:, :columns].transpose(1, 2) for x in (layer.keys, layer.values))
        out_BHLE = F.scaled_dot_product_attention(
            q_BLHE.transpose(1, 2), k_BHCE, v_BHCE, attn_mask=self.seen
        )
        return out_BHLE.transpose(1, 2)
