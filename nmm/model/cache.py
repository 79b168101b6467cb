"""Keys and values of what was read, so that one more token costs one column and not all of them.

Legend of shape suffixes: B rows, R some of them, C columns of the cache, L tokens, H heads, K heads
of keys and values, G = H / K, E channels of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nmm.model.attention import Attends

ROOM_COLUMNS = 64  # more, when what a layer took of a row has no room left


@dataclass
class Layer:
    """Keys and values [B, C, K, E] of one layer; what was not read yet is never seen.

    `lengths` int64[B] is what each row has of them, in a layer that takes some tokens; its columns
    are the tokens that it took, and they become more when there is no room.
    """

    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    lengths: Tensor = field(default_factory=lambda: torch.empty(0))


class Cache:
    """What `depth` layers remember of rows that hold one document each, up to `columns` tokens.

    Two prompts, "b I I x" and "b y", in a cache of 6 columns; both write z:

        first the batch      b I I x . .      images see all of themselves, as in training
                             b y _ _ . .      what padding left is written over before it is seen
        then one token each  b I I x z .      z sees columns 0 .. 4
                             b y z _ . .      z sees columns 0 .. 2

    A layer that took I, I and z of the first row and b of the second has only these: I I z and b.
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

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        layer = next(self.layers)
        room = (0, 0, 0, 0, 0, self.columns - k_BLKE.shape[1])
        layer.keys, layer.values = F.pad(k_BLKE, room), F.pad(v_BLKE, room)
        return self.plan.attend(q_BLHE, k_BLKE, v_BLKE)

    def some(self, plan: Attends, *, taken: Tensor) -> "FillingSome":
        """How the next layer does, which attends by this plan and took bool[B, L] of the tokens."""
        return FillingSome(plan, next(self.layers), taken)


@dataclass(frozen=True)
class FillingSome:
    """Attends as `plan` does, and keeps the keys and values of what is `taken`, side by side."""

    plan: Attends
    layer: Layer
    taken: Tensor

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        layer, layer.lengths = self.layer, self.taken.sum(dim=1)
        most = int(layer.lengths.max())
        order_BC = (~self.taken).int().argsort(dim=1, stable=True)[:, :most]
        row_B1 = torch.arange(len(order_BC), device=order_BC.device)[:, None]
        layer.keys, layer.values = k_BLKE[row_B1, order_BC], v_BLKE[row_B1, order_BC]
        return self.plan.attend(q_BLHE, k_BLKE, v_BLKE)


@dataclass(frozen=True)
class Adding:
    """Attends from one token a row, at column at[b], to those `seen` bool[B, 1, 1, C]."""

    layers: Iterator[Layer]
    at: Tensor
    seen: Tensor

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        layer, rows = next(self.layers), torch.arange(len(self.at), device=self.at.device)
        layer.keys[rows, self.at] = k_BLKE[:, 0]
        layer.values[rows, self.at] = v_BLKE[:, 0]
        columns = self.seen.shape[-1]
        return _attend(q_BLHE, layer.keys[:, :columns], layer.values[:, :columns], self.seen)

    def some(self, rows: Tensor) -> "AddingSome":
        """How the next layer does, which takes the tokens of the rows int64[R]."""
        return AddingSome(next(self.layers), rows)


@dataclass(frozen=True)
class AddingSome:
    """Attends from one token of each of some `rows` int64[R], which are the B of queries and keys,
    to what the layer took of them before.
    """

    layer: Layer
    rows: Tensor

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        layer, at_R = self.layer, self.layer.lengths[self.rows]
        columns = int(at_R.max()) + 1
        if columns > layer.keys.shape[1]:
            room = (0, 0, 0, 0, 0, ROOM_COLUMNS)
            layer.keys, layer.values = F.pad(layer.keys, room), F.pad(layer.values, room)
        layer.keys[self.rows, at_R] = k_BLKE[:, 0]
        layer.values[self.rows, at_R] = v_BLKE[:, 0]
        layer.lengths[self.rows] += 1
        seen_RC = torch.arange(columns, device=at_R.device) <= at_R[:, None]
        k_RCKE, v_RCKE = (x[self.rows, :columns] for x in (layer.keys, layer.values))
        return _attend(q_BLHE, k_RCKE, v_RCKE, seen_RC[:, None, None])


def _attend(q_BLHE: Tensor, k_BCKE: Tensor, v_BCKE: Tensor, seen: Tensor) -> Tensor:
    """From one token, L = 1."""
    k_BKCE, v_BKCE = k_BCKE.transpose(1, 2), v_BCKE.transpose(1, 2)
    # Queries that read the same keys take the place of tokens, so that no key is copied.
    q_BKGE = q_BLHE[:, 0].unflatten(1, (k_BKCE.shape[1], -1))
    out_BKGE = F.scaled_dot_product_attention(q_BKGE, k_BKCE, v_BKCE, attn_mask=seen)
    return out_BKGE.flatten(1, 2)[:, None]
