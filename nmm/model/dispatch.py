"""Moving tokens to experts and back by gathers and sums of few rows; no order is left to chance.

Legend of shape suffixes: T tokens, K experts that a token takes, S slots, E experts, D width.

A slot is a token in the hands of an expert. `collect` and `distribute` are each other's way back:
neither adds into a place that another thread may write to.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx


class Slots(NamedTuple):
    """Who takes what.

    token     int64[S], the token of every slot; slots are sorted by expert
    ends      int32[E], for every expert the slot behind its last one; the last one is S
    by_token  int64[S], the slots sorted by token
    starts    int64[T], for every token its first place in `by_token`

    Experts 0 and 1, tokens 0, 1 and 2, of which 1 is taken twice and 2 by nobody:

        slot     0  1  2        ends  1 3        by_token  1 0 2
        expert   0  1  1                         starts    0 1 3
        token    1  0  1
    """

    token: Tensor
    ends: Tensor
    by_token: Tensor
    starts: Tensor


def slots_of_choices(choice_TK: Tensor, *, experts: int) -> Slots:
    """K slots for every token. Places are counted: the order of a stable sort, in less time."""
    choice_S, per_token = choice_TK.flatten(), choice_TK.shape[1]
    number_S = torch.arange(len(choice_S), device=choice_S.device)
    number_E = torch.arange(experts, device=choice_S.device)
    count_ES = (choice_S == number_E[:, None]).cumsum(dim=1, dtype=torch.int32)
    ends_E = count_ES[:, -1].cumsum(0, dtype=torch.int32)
    begin_S = (ends_E - count_ES[:, -1])[choice_S]
    by_token_S = (begin_S + count_ES.gather(0, choice_S[None])[0] - 1).long()
    token_S = torch.empty_like(by_token_S).scatter_(0, by_token_S, number_S // per_token)
    return Slots(token_S, ends_E, by_token_S, starts=number_S[::per_token])


def slots_of_tokens(token_S: Tensor, ends_E: Tensor, *, tokens: int) -> Slots:
    """Of slots that are sorted by expert; a token may have any number of them."""
    sorted_S, by_token_S = token_S.sort(stable=True)
    number_T = torch.arange(tokens, device=token_S.device)
    return Slots(token_S, ends_E, by_token_S, torch.searchsorted(sorted_S, number_T))


def distribute(x_TD: Tensor, slots: Slots) -> Tensor:
    """[S, D]: every slot's token."""
    result = _Distribute.apply(x_TD, slots.token, slots.by_token, slots.starts)
    assert isinstance(result, Tensor)
    return result


def collect(x_SD: Tensor, weight_S: Tensor, slots: Slots) -> Tensor:
    """[T, D]: for every token the weighted sum of its slots; zero where it has none.

    Weights are sorted by token, like `by_token`.
    """
    result = _Collect.apply(x_SD, weight_S, slots.token, slots.by_token, slots.starts)
    assert isinstance(result, Tensor)
    return result


class _Distribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TD: Tensor, token_S: Tensor, by_token_S: Tensor, start_T: Tensor
    ) -> Tensor:
        ctx.save_for_backward(by_token_S, start_T)
        return x_TD.index_select(0, token_S)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        by_token_S, start_T = tuple(ctx.saved_tensors)
        grad_TD = F.embedding_bag(by_token_S, grad_outputs[0].contiguous(), start_T, mode="sum")
        return grad_TD, None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_SD: Tensor,
        weight_S: Tensor,
        token_S: Tensor,
        by_token_S: Tensor,
        start_T: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_SD, weight_S, token_S, by_token_S)
        weights = weight_S.to(x_SD.dtype)
        return F.embedding_bag(by_token_S, x_SD, start_T, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(
        ctx: BackwardCFunction, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        x_SD, weight_S, token_S, by_token_S = tuple(ctx.saved_tensors)
        grad_SD = grad_outputs[0].index_select(0, token_S)
        grad_weight_S = (grad_SD * x_SD).sum(dim=1)[by_token_S].to(weight_S.dtype)
        weight_S = torch.empty_like(weight_S).scatter_(0, by_token_S, weight_S)
        grad_SD *= weight_S[:, None].to(grad_SD.dtype)  # in place: a new block takes time to map
        return grad_SD, grad_weight_S, None, None, None
