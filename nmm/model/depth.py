"""Mixture of depths: who is taken by a block that takes some tokens only, and how they meet there.

Legend of shape suffixes: B rows, L tokens of a row, G groups of rows, N tokens of a group, S tokens
that a block computes with in place of these N, D width, T = G N tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmm.batch import Modality, PackedBatch, two_way
from nmm.config import AttentionBackend, ModelConfig
from nmm.model.attention import Attends, Rotary
from nmm.model.auxiliary import AuxiliaryRouters
from nmm.model.cache import Adding, Filling
from nmm.model.plan import backend_on, plan_of
from nmm.model.router import highest

Flips = Callable[[Tensor], Tensor]  # bool like a tensor: the decisions that are turned round


class Picked(NamedTuple):
    """What a block's router decides.

    kept        bool[G, N]; never padding
    gate        float32[G, N], what the block adds to a token is multiplied by it
    at_most     how many tokens of a group may be kept, known without a look at them
    auxiliary   float32 scalar, the loss of the auxiliary router, summed over tokens
    statistics  float32[modalities, 6], detached: the table of `Kept` in nmm/routing.py
    """

    kept: Tensor
    gate: Tensor
    at_most: int
    auxiliary: Tensor
    statistics: Tensor


class DepthRouter(nn.Module):
    """A block takes the tokens of a group of rows that it scores highest ("MoMa", section 2.3).

    Of b tokens these are b * capacity, rounded down; what the block adds to them is multiplied by
    the sigmoid of the score. With `causal` the auxiliary router says who is taken, with the score's
    sigmoid as before. `flips` turns some decisions round, to see what errors cost.
    """

    flips: Flips | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.mod
        self.weight = nn.Parameter(torch.empty(1, config.width))
        self.auxiliary = None
        if config.mod.auxiliary_router:
            self.auxiliary = AuxiliaryRouters(config.width, sizes={"all": 1})

    def forward(self, x_TD: Tensor, modality_GN: Tensor, causal: bool = False) -> Picked:
        # The first block sees equal ids as equal vectors. These must tie to the bit, whatever batch
        # they are in, which rows of a matrix product do not.
        score_GN = (x_TD.float() * self.weight.float()).sum(dim=1).view(modality_GN.shape)
        real_GN = modality_GN != Modality.pad
        limit_G = (real_GN.sum(dim=1).double() * self.config.capacity).long()
        lowest_GN = score_GN.detach().masked_fill(~real_GN, float("-inf"))
        kept_GN = highest(lowest_GN, limit=limit_G)
        guesses = None
        if self.auxiliary is not None:
            guesses = self.auxiliary(x_TD, kept_GN.view(-1, 1), real_GN.view(-1, 1))
        if causal:
            assert guesses is not None, "a block without an auxiliary router looks ahead"
            kept_GN = guesses.experts.view_as(kept_GN)
        if self.flips is not None:
            kept_GN = kept_GN ^ (self.flips(kept_GN) & real_GN)
        tokens = modality_GN.shape[1]
        any_number = causal or self.flips is not None
        at_most = tokens if any_number else max(1, int(tokens * self.config.capacity))
        counts_T4 = score_GN.new_zeros(len(x_TD), 4) if guesses is None else guesses.counts
        more_T2 = torch.stack([kept_GN.flatten(), real_GN.flatten()], dim=1).float()
        kinds = torch.arange(len(Modality), device=x_TD.device)
        of_kind_KT = (kinds[:, None] == modality_GN.flatten()) & real_GN.flatten()
        table = of_kind_KT.float() @ torch.cat([counts_T4, more_T2], dim=1)
        loss = score_GN.new_zeros(()) if guesses is None else guesses.loss.sum()
        return Picked(kept_GN, score_GN.sigmoid(), at_most, loss, table)


def flip(model: nn.Module, *, fraction: float, seed: int) -> None:
    """Turn this fraction of all blocks' decisions round from now on, drawn one after the other."""
    draw = torch.Generator().manual_seed(seed)

    def flips(kept: Tensor) -> Tensor:
        return (torch.rand(kept.shape, generator=draw) < fraction).to(kept.device)

    for module in model.modules():
        if isinstance(module, DepthRouter):
            module.flips = flips


class Some(NamedTuple):
    """Some tokens of a batch as rows of their own, in their order.

    index     int64[G, S], their places among the T tokens
    real      bool[G, S]: the others fill the row up, are nobody's neighbours and are not read
    slot      int64[T], the place of every token among these; G S for those that are not
    modality  uint8[G, S], padding where not real
    rotary    of their own positions
    plan      how they attend to each other
    """

    index: Tensor
    real: Tensor
    slot: Tensor
    modality: Tensor
    rotary: Rotary | None
    plan: Attends

    def take(self, x_TD: Tensor) -> Tensor:
        """[G, S, D]."""
        return x_TD[self.index.flatten()].view(*self.index.shape, -1)

    def put_back(self, y_GSD: Tensor) -> Tensor:
        """[T, D]: zeros for tokens that were not taken."""
        y_SD = y_GSD.flatten(0, 1)
        return torch.cat([y_SD, torch.zeros_like(y_SD[:1])]).index_select(0, self.slot)


@dataclass(frozen=True)
class Rows:
    """What tells tokens of a batch apart, all [G, N]; G groups of rows stand side by side.

    document  unique in a group, 0 at padding; image is two-way (`two_way` of nmm/batch.py)
    plan      (document [G, S], image [G, S], exact) -> how to attend; `exact` where what a token
              sees must be the same to the bit however many others follow
    """

    document: Tensor
    image: Tensor
    modality: Tensor
    rotary: Rotary | None
    plan: Callable[[Tensor, Tensor, bool], Attends]

    def group(self, x_BLD: Tensor) -> Tensor:
        """[T, D], with zeros for rows that fill up the last group."""
        x_TD = x_BLD.flatten(0, 1)
        return F.pad(x_TD, (0, 0, 0, self.document.numel() - len(x_TD)))

    def some(self, picked: Picked) -> Some:
        """Those that are kept: where any number may be, each at its own place, else side by side.

        Half of six places at most, "x" kept:    . x . . x .    index  1 4 0    slot  3 0 3 3 1 3
        """
        groups, tokens = picked.kept.shape
        number_N = torch.arange(tokens, device=picked.kept.device)
        in_place = picked.at_most == tokens
        order_GN = number_N.expand(groups, -1)
        if not in_place:
            order_GN = (~picked.kept).int().argsort(dim=1, stable=True)[:, : picked.at_most]
        real_GS = picked.kept.gather(1, order_GN)
        first_G1 = torch.arange(groups, device=number_N.device)[:, None]
        place_GN = number_N if in_place else picked.kept.cumsum(dim=1) - 1
        slot_GN = first_G1 * picked.at_most + place_GN
        index_GS = first_G1 * tokens + order_GN
        document_GS, image_GS, modality_GS = (
            x.gather(1, order_GN) * real_GS for x in (self.document, self.image, self.modality)
        )
        rotary = self.rotary
        if rotary is not None:
            rotary = Rotary(*(x.flatten(0, 1)[index_GS] for x in rotary))
        return Some(
            index=index_GS,
            real=real_GS,
            slot=torch.where(picked.kept, slot_GN, real_GS.numel()).flatten(),
            modality=modality_GS,
            rotary=rotary,
            plan=self.plan(document_GS, image_GS, in_place),
        )


@dataclass(frozen=True)
class OneEach:
    """One more token of every row, [B, 1], each a group of its own; in place of `Rows`."""

    modality: Tensor
    rotary: Rotary | None
    adding: Adding

    def group(self, x_BLD: Tensor) -> Tensor:
        """[T, D]."""
        return x_BLD.flatten(0, 1)

    def some(self, picked: Picked) -> Some | None:
        """Those that are kept, each a row; None where none is, so that nothing is computed."""
        row_R = picked.kept[:, 0].nonzero().flatten()
        plan = self.adding.some(row_R)
        if len(row_R) == 0:
            return None
        slot_T = torch.full_like(self.modality[:, 0], len(row_R), dtype=torch.int64)
        slot_T[row_R] = torch.arange(len(row_R), device=row_R.device)
        return Some(
            index=row_R[:, None],
            real=picked.kept[row_R],
            slot=slot_T,
            modality=self.modality[row_R],
            rotary=None if self.rotary is None else Rotary(*(x[row_R] for x in self.rotary)),
            plan=plan,
        )


def rows_of(
    batch: PackedBatch,
    *,
    config: ModelConfig,
    rotary: Rotary | None,
    dtype: torch.dtype,
    filling: Filling | None = None,
) -> Rows:
    """The groups of `model.mod.group_rows` rows of a batch; `dtype` is the queries'.

    A cache that is `filling` remembers what is kept. It holds rows, so that each is a group.

    NOTE: in place of `flex`, whose kernel wants to be planned beforehand, `mask` serves blocks that
    take some tokens: at capacity 1/4 its mask is 1/16 of that of whole rows.
    """
    together = 1 if filling else config.mod.group_rows
    rows, length = batch.document.shape
    missing = -rows % together
    row_B1 = torch.arange(rows, device=batch.document.device)[:, None] % together
    document = batch.document + (batch.document > 0) * row_B1 * (length + 1)
    image = two_way(batch.document, batch.image, attention=config.image_attention)
    document, image, modality = (
        F.pad(x, (0, 0, 0, missing)).reshape(-1, together * length)
        for x in (document, image, batch.modality)
    )
    if rotary is not None:
        padded = (F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) for x in rotary)
        rotary = Rotary(*(x.reshape(-1, together * length, *x.shape[2:]) for x in padded))
    backend = backend_on(batch.document.device, asked=config.attention, lengths_change=True)

    def plan(document: Tensor, image: Tensor, exact: bool) -> Attends:
        chosen = AttentionBackend.mask if exact else backend
        attends = plan_of(document, image, backend=chosen, dtype=dtype)
        return filling.some(attends, taken=document > 0) if filling else attends

    return Rows(document, image, modality, rotary, plan)
