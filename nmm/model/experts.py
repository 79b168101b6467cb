"""Computing with tokens that are sorted by expert: one grouped product in place of many.

Legend of shape suffixes: S slots, E experts, D width, F inner size of an expert; I in and O out of
one product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from nmm.config import ModelConfig

ALIGNED_BYTES = 16  # grouped products want rows that begin at multiples of this


class Experts(nn.Module):
    """SwiGLU layers side by side, w2(silu(w1(x)) * w3(x)), each for its own slots.

    The names are those of Mixtral, which DeepSpeed knows too. `numbers` are those that are here of
    the layer's `total` experts, ascending: all, unless somebody divides them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.moe.total_experts, config.width, config.expert_hidden
        self.total, self.numbers = experts, list(range(experts))
        self.w1 = nn.Parameter(torch.empty(experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        """`ends` int32[E] is for every expert the slot behind its last one; the last one is S."""
        w1_EFD, w2_EDF, w3_EFD = self.w1, self.w2, self.w3
        if more := -w1_EFD.shape[1] % (ALIGNED_BYTES // x_SD.element_size()):
            w1_EFD, w2_EDF, w3_EFD = with_more_channels(w1_EFD, w2_EDF, w3_EFD, more=more)
        hidden_SF = F.silu(grouped_linear(x_SD, w1_EFD, ends_E))
        hidden_SF = hidden_SF * grouped_linear(x_SD, w3_EFD, ends_E)
        return grouped_linear(hidden_SF, w2_EDF, ends_E)

    def keep(self, numbers: list[int]) -> None:
        """Only these stay, with copies of their weights, so that those of the others are freed."""
        self.numbers = numbers
        for name, weight in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(weight.detach()[numbers]))


def with_more_channels(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, *, more: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same experts with inner channels that are 0; for odd sizes such as MoMa's 1,365."""
    return F.pad(w1_EFD, (0, 0, 0, more)), F.pad(w2_EDF, (0, more)), F.pad(w3_EFD, (0, 0, 0, more))


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """[S, O]: F.linear of every expert's slots with its own weight."""
    result = _GroupedLinear.apply(x_SI, weight_EOI, ends_E)
    assert isinstance(result, Tensor)
    return result


class _GroupedLinear(torch.autograd.Function):
    """Torch's own way back refuses gradients without strides, such as those of a sum."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SI, weight_EOI, ends_E)
        return F.grouped_mm(x_SI, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x_SI, weight_EOI, ends_E = tuple(ctx.saved_tensors)
        grad_SO = grad_outputs[0].contiguous()
        grad_x_SI = F.grouped_mm(grad_SO, weight_EOI, offs=ends_E)
        return grad_x_SI, F.grouped_mm(grad_SO.t(), x_SI, offs=ends_E), None
