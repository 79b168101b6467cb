"""The layers that every block is made of: a gain-only norm and the SwiGLU feed-forward.

Legend of shape suffixes: D width, F hidden size of the feed-forward; leading dimensions are free.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def norm(width: int, *, eps: float) -> nn.LayerNorm:
    """A LayerNorm with a gain and no bias."""
    return nn.LayerNorm(width, eps=eps, bias=False)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate first."""

    def __init__(self, width: int, *, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        gate_F, up_F = self.gate_up(x_D).chunk(2, dim=-1)
        return self.down(F.silu(gate_F) * up_F)
