"""A block of the decoder or the vision encoder, and a stack of blocks.

Legend of shape suffixes: B rows, L tokens of a row, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nmm.config import BlockConfig, NormPosition
from nmm.model.attention import Attends, Attention, Rotary
from nmm.model.layers import feed_forward, norm


class Block(nn.Module):
    """x + f(norm(x)) with f = attention, then with f = feed-forward; x + norm(f(x)) for swin."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.norms_first = config.norm_position is NormPosition.pre
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.ffn_norm = norm(config)
        self.ffn = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, *, rotary: Rotary | None, plan: Attends) -> Tensor:
        if self.norms_first:
            x_BLD = x_BLD + self._attend(self.attention_norm(x_BLD), rotary=rotary, plan=plan)
            return x_BLD + self.dropout(self.ffn(self.ffn_norm(x_BLD)))
        x_BLD = x_BLD + self.attention_norm(self._attend(x_BLD, rotary=rotary, plan=plan))
        return x_BLD + self.ffn_norm(self.dropout(self.ffn(x_BLD)))

    def _attend(self, x_BLD: Tensor, *, rotary: Rotary | None, plan: Attends) -> Tensor:
        return self.dropout(self.attention(x_BLD, rotary=rotary, plan=plan))


class Stacked(NamedTuple):
    """What a stack returns.

    output   [B, L, D], the last block's
    squares  float32[blocks], of every block's output the sum of squares at the watched positions;
             float32[0] when nothing is watched
    """

    output: Tensor
    squares: Tensor


class Stack(nn.ModuleList):
    """Blocks one after the other.

    With `recomputes`, only the input of every block is kept for the way back, where the block runs
    again: activations of one block at a time, for a third more work.
    """

    recomputes = False

    def forward(
        self,
        x_BLD: Tensor,
        *,
        rotary: Rotary | None,
        plan: Attends,
        watched_BL: Tensor | None = None,
    ) -> Stacked:
        squares = [x_BLD.new_empty(0, dtype=torch.float32)]
        for block in self:
            if self.recomputes and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, use_reentrant=False, rotary=rotary, plan=plan)
            else:
                x_BLD = block(x_BLD, rotary=rotary, plan=plan)
            if watched_BL is not None:
                squares.append(_square_sum(x_BLD.detach(), at_BL=watched_BL))
        return Stacked(x_BLD, torch.cat(squares))

    def compile_blocks(self) -> None:
        """Compile every block at its first call; equal blocks share what is compiled."""
        for block in self:
            block.forward = torch.compile(block.forward, dynamic=False)


def _square_sum(x_BLD: Tensor, *, at_BL: Tensor) -> Tensor:
    """float32[1], without a copy of x in float32."""
    norm_BL = torch.linalg.vector_norm(x_BLD, dim=-1, dtype=torch.float32)
    return (norm_BL.square() * at_BL).sum()[None]
