"""A block of the decoder or the vision encoder, and a stack of blocks.

Legend of shape suffixes: B rows, L tokens of a row, D width, Y blocks with experts, E
experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nmm.config import BlockConfig, NormPosition
from nmm.model.attention import Attends, Attention, Rotary
from nmm.model.layers import Fed, norm


class Block(nn.Module):
    """x + f(norm(x)) with f = attention, then with f = `ffn`; x + norm(f(x)) for swin.

    Beside its output it returns what the feed-forward layer says of the tokens that it was given.
    """

    def __init__(self, config: BlockConfig, *, ffn: nn.Module) -> None:
        super().__init__()
        self.norms_first = config.norm_position is NormPosition.pre
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.ffn_norm = norm(config)
        self.ffn = ffn
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        rotary: Rotary | None,
        plan: Attends,
        modality_BL: Tensor | None = None,
        causal: bool = False,
    ) -> Fed:
        if self.norms_first:
            x_BLD = x_BLD + self._attend(self.attention_norm(x_BLD), rotary=rotary, plan=plan)
            fed = self.ffn(self.ffn_norm(x_BLD), modality_BL, causal)
            return fed._replace(output=x_BLD + self.dropout(fed.output))
        x_BLD = x_BLD + self.attention_norm(self._attend(x_BLD, rotary=rotary, plan=plan))
        fed = self.ffn(x_BLD, modality_BL, causal)
        return fed._replace(output=x_BLD + self.ffn_norm(self.dropout(fed.output)))

    def _attend(self, x_BLD: Tensor, *, rotary: Rotary | None, plan: Attends) -> Tensor:
        return self.dropout(self.attention(x_BLD, rotary=rotary, plan=plan))


class Stacked(NamedTuple):
    """What a stack returns.

    output   [B, L, D], the last block's
    squares  float32[blocks], of every block's output the sum of squares at the watched positions;
             float32[0] when nothing is watched
    auxiliary   float32 scalar, the sum of the blocks' own
    statistics  float32[Y, modalities, E + 8], of every block with experts its own; [0] if none has
    """

    output: Tensor
    squares: Tensor
    auxiliary: Tensor
    statistics: Tensor


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
        modality_BL: Tensor | None = None,
        watched_BL: Tensor | None = None,
        causal: bool = False,
    ) -> Stacked:
        nothing = x_BLD.new_zeros((), dtype=torch.float32)
        squares, auxiliary, statistics = [nothing.new_empty(0)], nothing, []
        for block in self:
            around = {"rotary": rotary, "plan": plan, "modality_BL": modality_BL, "causal": causal}
            if self.recomputes and torch.is_grad_enabled():
                fed = checkpoint(block, x_BLD, use_reentrant=False, **around)
            else:
                fed = block(x_BLD, **around)
            x_BLD = fed.output
            if fed.statistics is not None:
                auxiliary = auxiliary + fed.auxiliary
                statistics.append(fed.statistics)
            if watched_BL is not None:
                squares.append(_square_sum(x_BLD.detach(), at_BL=watched_BL))
        tables = torch.stack(statistics) if statistics else nothing.new_empty(0)
        return Stacked(x_BLD, torch.cat(squares), auxiliary, tables)

    def compile_blocks(self) -> None:
        """Compile every block at its first call; equal blocks share what is compiled."""
        for block in self:
            block.forward = torch.compile(block.forward, dynamic=False)


def _square_sum(x_BLD: Tensor, *, at_BL: Tensor) -> Tensor:
    """float32[1], without a copy of x in float32."""
    norm_BL = torch.linalg.vector_norm(x_BLD, dim=-1, dtype=torch.float32)
    return (norm_BL.square() * at_BL).sum()[None]
