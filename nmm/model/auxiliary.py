"""Routers that guess from a token alone which experts would choose it among many, or which layers.

Legend of shape suffixes: T tokens, D width, E experts, S slots.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A product's rows are the same to the bit in any company if there are a multiple of so many, as
# measured on CPUs in fp32 and bf16; of fewer or others the last ones are computed in another order.
ROWS_AT_ONCE = 16


class Guesses(NamedTuple):
    """What auxiliary routers say, and how right they are.

    experts  bool[T, E], those that a token goes to; none of another modality, none for padding
    loss     float32[T], the binary cross-entropy, a mean over the experts that may take the token
    counts   float32[T, 4], the columns WANTED to SURPRISE of nmm/routing.py
    """

    experts: Tensor
    loss: Tensor
    counts: Tensor


class AuxiliaryRouters(nn.Module):
    """For every group of experts Sigmoid(SiLU(x W1) W2), W1 to half the width ("MoMa", equation 3).

    A layer that takes some tokens is a group of one (equation 4).

    An expert takes a token where this is above 0.5. What is learned does not reach the tokens.
    """

    def __init__(self, width: int, *, sizes: dict[str, int]) -> None:
        super().__init__()
        half = width // 2
        for name, experts in sizes.items():
            layers = (nn.Linear(width, half, bias=False), nn.SiLU())
            self.add_module(name, nn.Sequential(*layers, nn.Linear(half, experts, bias=False)))

    def forward(self, x_TD: Tensor, wanted_TE: Tensor, serves_TE: Tensor) -> Guesses:
        """`wanted` are the experts' own choices, bool[T, E], `serves` those that may choose."""
        logits = [layers(x_TD.detach()).float() for layers in self.children()]
        logits_TE = torch.cat(logits, dim=1)
        experts_TE = (logits_TE > 0) & serves_TE
        surprise_TE = F.binary_cross_entropy_with_logits(
            logits_TE, wanted_TE.float(), reduction="none"
        )
        loss_T = (surprise_TE * serves_TE).sum(dim=1) / serves_TE.sum(dim=1).clamp(min=1)
        counted = (wanted_TE, experts_TE, wanted_TE & experts_TE)
        columns = [*(each.sum(dim=1).float() for each in counted), loss_T.detach()]
        return Guesses(experts_TE, loss_T, torch.stack(columns, dim=1))


def even_cells(taken_ET: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots for what is taken, those of an expert a multiple of ROWS_AT_ONCE, some at least.

    int64[S], the place of every slot in E T of them; bool[S], if it counts, because what fills an
    expert's slots up is the last token; and int32[E], the ends of the experts. So what an expert
    makes of a token is the same to the bit whatever other tokens it has.
    """
    tokens = taken_ET.shape[1]
    counts_E = taken_ET.sum(dim=1)
    rooms_E = (counts_E + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE * ROWS_AT_ONCE
    rooms_E[-1].clamp_(min=ROWS_AT_ONCE)
    ends_E = rooms_E.cumsum(0)
    skipped_E = (ends_E - rooms_E) - (counts_E.cumsum(0) - counts_E)
    expert_C, token_C = taken_ET.nonzero(as_tuple=True)
    place_C = torch.arange(len(expert_C), device=taken_ET.device) + skipped_E[expert_C]
    cell_S = place_C.new_full((int(ends_E[-1]),), tokens - 1)
    real_S = torch.zeros_like(cell_S, dtype=torch.bool)
    cell_S[place_C], real_S[place_C] = expert_C * tokens + token_C, True
    return cell_S, real_S, ends_E.int()
