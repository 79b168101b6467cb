"""Deciding which expert takes which token; nothing is moved or computed with here.

Legend of shape suffixes: G groups of rows, N tokens of a group, T = G N tokens, D width, E experts,
K experts that a token takes, S slots.

All is decided on the device: nothing waits for counts.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from nmm.batch import Modality
from nmm.config import ModelConfig, MoEConfig, Routing
from nmm.model.auxiliary import AuxiliaryRouters, even_cells
from nmm.model.dispatch import Slots, slots_of_choices, slots_of_tokens


class Assignment(NamedTuple):
    """What a router decides, and what that costs.

    weight      float32[S] by token, what the expert's output in a slot is multiplied by
    auxiliary   float32 scalar, the router's own losses, summed over tokens
    statistics  float32[modalities, E + 8], detached: the table of nmm/routing.py
    """

    slots: Slots
    weight: Tensor
    auxiliary: Tensor
    statistics: Tensor


class Group(NamedTuple):
    """The experts from `first` to `last` - 1 serve one modality, or with None all of them."""

    modality: Modality | None
    first: int
    last: int

    def holds(self, modality: Tensor) -> Tensor:
        """bool: the tokens that are served; padding never is."""
        return modality != Modality.pad if self.modality is None else modality == self.modality


def groups(config: MoEConfig) -> list[Group]:
    """In the order of their experts' numbers."""
    ends = [0, *accumulate(config.sizes.values())]
    modalities = [None if name == "all" else Modality[name] for name in config.sizes]
    return [Group(*each) for each in zip(modalities, ends[:-1], ends[1:], strict=True)]


def router(config: ModelConfig) -> nn.Module:
    """The configured way of routing: (x [T, D], modality [G, N], causal) -> Assignment.

    With `causal` no token's routing depends on others; that of tokens that choose never does.
    """
    match config.moe.routing:
        case Routing.token_choice | Routing.modality_groups:
            return TokenChoice(config)
        case Routing.expert_choice:
            return ExpertChoice(config)
        case _:
            return ByModality(config)


class ByModality(nn.Module):
    """Every token goes to the expert of its modality; padding, which nobody reads, to the first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups = groups(config.moe)

    def forward(self, x_TD: Tensor, modality_GN: Tensor, causal: bool = False) -> Assignment:
        serves_ET = _serves(modality_GN.flatten(), self.groups)
        choice_T = serves_ET.int().argmax(dim=0)
        slots = slots_of_choices(choice_T[:, None], experts=len(self.groups))
        nothing_T = torch.zeros_like(choice_T, dtype=torch.float32)
        table = _table(modality_GN, serves_ET, entropy_T=nothing_T, balance_T=nothing_T)
        return Assignment(slots, torch.ones_like(nothing_T), nothing_T.sum(), table)


class TokenChoice(nn.Module):
    """Every token takes the `top_k` experts of its group with the highest softmax probabilities.

    These multiply the experts' outputs as they are, without adding up to 1. The balance of a group
    of rows is E / (K N) * sum over experts of (tokens on it) * (mean of its probability): 1 if all
    are alike (Fedus et al., "Switch Transformers", equation 4, with E the experts that a token may
    take). The z-loss is that of Zoph et al., "ST-MoE", equation 5.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.groups = config.moe, groups(config.moe)
        self.weight = nn.Parameter(torch.empty(config.moe.total_experts, config.width))

    def forward(self, x_TD: Tensor, modality_GN: Tensor, causal: bool = False) -> Assignment:
        modality_T = modality_GN.flatten()
        real_T = modality_T != Modality.pad
        # Padding chooses like a token of the first group, and is not counted.
        first = self.groups[0].modality or Modality.text
        serves_ET = _serves(modality_T.masked_fill(~real_T, first), self.groups)
        logits_ET = _logits(x_TD, self.weight)
        if len(self.groups) > 1:
            logits_ET = logits_ET.masked_fill(~serves_ET, float("-inf"))
        chance_ET = logits_ET.softmax(dim=0)
        weight_KT, choice_KT = _highest_experts(chance_ET, self.config.top_k)
        slots = slots_of_choices(choice_KT.t(), experts=len(serves_ET))
        taken_ET = torch.zeros_like(serves_ET).scatter_(0, choice_KT, True)
        load_EG = _load(taken_ET & real_T, serves_ET & real_T, modality_GN)
        balance_GN = (chance_ET.view(-1, *modality_GN.shape) * load_EG[..., None]).sum(dim=0)
        balance_T = balance_GN.flatten() * serves_ET.sum(dim=0) / self.config.top_k
        loss_T = self.config.balance_weight * balance_T
        if self.config.router_z_weight:
            loss_T = loss_T + self.config.router_z_weight * logits_ET.logsumexp(dim=0).square()
        entropy_T = torch.special.entr(chance_ET.detach()).sum(dim=0)
        table = _table(modality_GN, taken_ET, entropy_T=entropy_T, balance_T=balance_T.detach())
        return Assignment(slots, weight_KT.t().flatten(), (loss_T * real_T).sum(), table)


class ExpertChoice(nn.Module):
    """Every expert takes the tokens of its group that it scores highest ("MoMa", section 2.2).

    Of b tokens of its modality in a group of rows these are b * capacity / (experts of the
    modality), rounded down. Any number of experts may take a token; the output of each is
    multiplied by the sigmoid of its score. With `causal` auxiliary routers say who takes what.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.groups = config.moe, groups(config.moe)
        self.weight = nn.Parameter(torch.empty(config.moe.total_experts, config.width))
        self.auxiliary = None
        if config.moe.auxiliary_routers:
            self.auxiliary = AuxiliaryRouters(config.width, sizes=config.moe.sizes)

    def forward(self, x_TD: Tensor, modality_GN: Tensor, causal: bool = False) -> Assignment:
        logits_ET = _logits(x_TD, self.weight)
        if self.training and self.config.gumbel_noise and self.auxiliary is None:
            logits_ET = logits_ET + _gumbel_difference(logits_ET)
        chance_ET = logits_ET.sigmoid()
        serves_ET = _serves(modality_GN.flatten(), self.groups)
        taken_ET = self._takes(logits_ET.detach(), serves_ET, modality_GN)
        guesses = self.auxiliary and self.auxiliary(x_TD, taken_ET.t(), serves_ET.t())
        if causal:
            assert guesses is not None, "expert choice without auxiliary routers looks ahead"
            taken_ET = guesses.experts.t()
        cell_S, real_S, ends_E = even_cells(taken_ET) if causal else self._cells(taken_ET)
        slots = slots_of_tokens(cell_S % len(x_TD), ends_E, tokens=len(x_TD))
        cell_S, real_S = cell_S[slots.by_token], real_S[slots.by_token]
        weight_S = chance_ET.flatten().index_select(0, cell_S) * real_S
        entropy_ET = _binary_entropy(chance_ET.detach()) * serves_ET
        entropy_T = entropy_ET.sum(dim=0) / serves_ET.sum(dim=0).clamp(min=1)
        table = _table(
            modality_GN,
            taken_ET,
            entropy_T=entropy_T,
            balance_T=torch.zeros_like(entropy_T),
            guesses_T4=None if guesses is None else guesses.counts,
        )
        loss = chance_ET.new_zeros(()) if guesses is None else guesses.loss.sum()
        return Assignment(slots, weight_S, loss, table)

    def _cells(self, taken_ET: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots for what is taken, as many as experts can take at most: their size is known before.

        int64[S], the place of every slot in E T of them; bool[S], if it counts; int32[E], the ends
        of the experts. What is left over falls to the last expert, with any tokens.
        """
        at_most = max(1, math.ceil(taken_ET.shape[1] * self.config.capacity))
        cell_S, real_S = _first_true(taken_ET.flatten(), at_most=at_most)
        ends_E = taken_ET.sum(dim=1).cumsum(0).int()
        ends_E[-1:] = len(cell_S)
        return cell_S, real_S, ends_E

    def _takes(self, score_ET: Tensor, serves_ET: Tensor, modality_GN: Tensor) -> Tensor:
        """bool[E, T]: the highest scores of every expert in every group of rows, ties in order."""
        score_ET = score_ET.masked_fill(~serves_ET, float("-inf"))
        score_EGN = score_ET.unflatten(1, modality_GN.shape)
        return highest(score_EGN, limit=self._limits(modality_GN)).flatten(1)

    def _limits(self, modality_GN: Tensor) -> Tensor:
        """int64[E, G]: how many tokens of a group of rows each expert takes."""
        limits = []
        for group in self.groups:
            experts = group.last - group.first
            held_G = group.holds(modality_GN).sum(dim=1)
            limit_G = (held_G.double() * self.config.capacity / experts).long()
            limits.append(limit_G.expand(experts, -1))
        return torch.cat(limits)


def highest(score: Tensor, *, limit: Tensor) -> Tensor:
    """bool[..., N]: the `limit` int64[...] highest of the last dimension, ties in order.

    Scores are compared in steps of 2^-12. Every document begins with the same token, so that many
    are equal but for rounding, which would choose among them otherwise in another batch.
    """
    order = (score * 4096).round().argsort(dim=-1, descending=True, stable=True)
    number_N = torch.arange(score.shape[-1], device=score.device)
    taken = torch.zeros_like(score, dtype=torch.bool)
    return taken.scatter_(-1, order, number_N < limit[..., None])


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """float32[E, T], whatever the precision of the model; experts first, because there are few."""
    result = _Logits.apply(x_TD, weight_ED)
    assert isinstance(result, Tensor)
    return result


class _Logits(torch.autograd.Function):
    """What goes back is rounded to the model's precision at once, and no float32 copy is kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return weight_ED.float() @ x_TD.float().t()

    @staticmethod
    def backward(ctx: BackwardCFunction, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = tuple(ctx.saved_tensors)
        grad_ET = grad_outputs[0].to(x_TD.dtype)
        grad_TD = grad_ET.t() @ weight_ED.to(x_TD.dtype)
        return grad_TD, (grad_ET @ x_TD).to(weight_ED.dtype)


def _highest_experts(chance_ET: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The highest chances [K, T] of every token, and int64[K, T], whose they are."""
    if top_k == 1:  # a fraction of the time
        found = chance_ET.max(dim=0, keepdim=True)
        return found.values, found.indices
    return chance_ET.topk(top_k, dim=0)


def _serves(modality_T: Tensor, groups: list[Group]) -> Tensor:
    """bool[E, T]: the experts that may take a token."""
    return torch.cat([g.holds(modality_T).expand(g.last - g.first, -1) for g in groups])


def _load(taken_ET: Tensor, serves_ET: Tensor, modality_GN: Tensor) -> Tensor:
    """float32[E, G]: the share that an expert took of what it may take in a group of rows."""
    taken_EG, serves_EG = (
        x.unflatten(1, modality_GN.shape).sum(dim=2) for x in (taken_ET, serves_ET)
    )
    return taken_EG / serves_EG.clamp(min=1)


def _table(
    modality_GN: Tensor,
    taken_ET: Tensor,
    *,
    entropy_T: Tensor,
    balance_T: Tensor,
    guesses_T4: Tensor | None = None,
) -> Tensor:
    """float32[modalities, E + 8]: sums over the tokens of every modality; none over padding."""
    modality_T = modality_GN.flatten()
    kinds = torch.arange(len(Modality), device=modality_T.device)
    of_kind_KT = (kinds[:, None] == modality_T) & (modality_T != Modality.pad)
    dropped_T = ~taken_ET.any(dim=0)
    more = (torch.ones_like(dropped_T), dropped_T, entropy_T, balance_T)
    if guesses_T4 is None:
        guesses_T4 = entropy_T.new_zeros(len(entropy_T), 4)
    rows = (taken_ET.float(), guesses_T4.t(), torch.stack([x.float() for x in more]))
    return of_kind_KT.float() @ torch.cat(rows).t()


def _gumbel_difference(like: Tensor) -> Tensor:
    """The difference of two independent Gumbel numbers, which is logistic ("MoMa", equation 5)."""
    return torch.rand_like(like).clamp_(1e-7, 1 - 1e-7).logit_()


def _binary_entropy(chance: Tensor) -> Tensor:
    """In nats."""
    return torch.special.entr(chance) + torch.special.entr(1 - chance)


def _first_true(flag_C: Tensor, *, at_most: int) -> tuple[Tensor, Tensor]:
    """int64[at_most]: the places of what is true, in order; and bool[at_most], if there is one.

    Like `nonzero`, of a length that is known beforehand. Behind the last one are any places.
    """
    number_C = torch.arange(len(flag_C), device=flag_C.device)
    number_S = torch.arange(at_most + 1, device=flag_C.device)
    into_C = torch.where(flag_C, flag_C.cumsum(0) - 1, at_most)
    place_S = (number_S % len(flag_C)).scatter_(0, into_C, number_C)[:at_most]
    return place_S, number_S[:at_most] < flag_C.sum()
