"""A block of the decoder or the vision encoder, and a stack of blocks.

Legend of shape suffixes: B rows, L tokens of a row, D width, Y blocks with experts, E experts, Z
blocks that take some tokens, G groups of rows, S tokens of a group that are taken, T all tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nmm.config import BlockConfig, NormPosition
from nmm.model.attention import Attends, Attention, Rotary
from nmm.model.depth import DepthRouter, OneEach, Rows
from nmm.model.layers import Fed, norm


class Block(nn.Module):
    """x + f(norm(x)) with f = attention, then with f = `ffn`; x + norm(f(x)) for swin.

    Beside its output it returns what the feed-forward layer says of the tokens that it was given.
    With a `depth_router` it takes some tokens, as if there were no others: x' = x + gate f(x), with
    f what a block adds to x; all others stay as they are.
    """

    def __init__(
        self, config: BlockConfig, *, ffn: nn.Module, depth_router: DepthRouter | None = None
    ) -> None:
        super().__init__()
        self.depth_router = depth_router
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
        rows: Rows | OneEach | None = None,
    ) -> Fed:
        """`rows` are the groups of rows that a `depth_router` chooses among."""
        if self.depth_router is not None:
            assert rows is not None
            return self._some(x_BLD, rows=rows, causal=causal)
        _, h_BLD, fed = self._adds(x_BLD, rotary, plan, modality_BL, causal)
        return fed._replace(output=h_BLD + fed.output)

    def _adds(
        self,
        x_BLD: Tensor,
        rotary: Rotary | None,
        plan: Attends,
        modality_BL: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Fed]:
        """What attention adds to x, x with it, and what the feed-forward layer adds to that."""
        if self.norms_first:
            attended = self._attend(self.attention_norm(x_BLD), rotary=rotary, plan=plan)
            h_BLD = x_BLD + attended
            fed = self.ffn(self.ffn_norm(h_BLD), modality_BL, causal)
            return attended, h_BLD, fed._replace(output=self.dropout(fed.output))
        attended = self.attention_norm(self._attend(x_BLD, rotary=rotary, plan=plan))
        h_BLD = x_BLD + attended
        fed = self.ffn(h_BLD, modality_BL, causal)
        return attended, h_BLD, fed._replace(output=self.ffn_norm(self.dropout(fed.output)))

    def _some(self, x_BLD: Tensor, *, rows: Rows | OneEach, causal: bool) -> Fed:
        assert self.depth_router is not None
        x_TD = rows.group(x_BLD)
        picked = self.depth_router(x_TD, rows.modality, causal)
        some = rows.some(picked)
        if some is None:
            return Fed(x_BLD, picked.auxiliary, None, picked.statistics)
        attended, _, fed = self._adds(
            some.take(x_TD), some.rotary, some.plan, some.modality, causal
        )
        gate_GS1 = picked.gate.flatten()[some.index][..., None]
        added_GSD = ((attended + fed.output) * gate_GS1).to(x_TD.dtype)
        x_TD = x_TD + some.put_back(added_GSD)
        return Fed(
            x_TD[: x_BLD.shape[0] * x_BLD.shape[1]].view_as(x_BLD),
            picked.auxiliary if fed.auxiliary is None else picked.auxiliary + fed.auxiliary,
            fed.statistics,
            picked.statistics,
        )

    def _attend(self, x_BLD: Tensor, *, rotary: Rotary | None, plan: Attends) -> Tensor:
        return self.dropout(self.attention(x_BLD, rotary=rotary, plan=plan))


class Stacked(NamedTuple):
    """What a stack returns.

    output   [B, L, D], the last block's
    squares  float32[blocks], of every block's output the sum of squares at the watched positions;
             float32[0] when nothing is watched
    auxiliary   float32 scalar, the sum of the blocks' own
    statistics  float32[Y, modalities, E + 8], of every block with experts its own; [0] if none has
    kept        float32[Z, modalities, 6], of every block that takes some tokens its own; likewise
    """

    output: Tensor
    squares: Tensor
    auxiliary: Tensor
    statistics: Tensor
    kept: Tensor


class Stack(nn.ModuleList):
    """Blocks one after the other.

    With `recomputes`, only the input of every block is kept for the way back, where the block runs
    again: activations of one block at a time, for a third more work. Where `rows_change` from batch
    to batch, as images do, what is compiled serves any number of them.
    """

    recomputes = False
    rows_change = False

    def forward(
        self,
        x_BLD: Tensor,
        *,
        rotary: Rotary | None,
        plan: Attends,
        modality_BL: Tensor | None = None,
        watched_BL: Tensor | None = None,
        causal: bool = False,
        rows: Rows | OneEach | None = None,
    ) -> Stacked:
        nothing = x_BLD.new_zeros((), dtype=torch.float32)
        squares, auxiliary = [nothing.new_empty(0)], nothing
        statistics, kept = [], []
        around = {"rotary": rotary, "plan": plan, "modality_BL": modality_BL}
        around |= {"causal": causal, "rows": rows}
        for block in self:
            if self.recomputes and torch.is_grad_enabled():
                fed = checkpoint(block, x_BLD, use_reentrant=False, **around)
            else:
                fed = block(x_BLD, **around)
            x_BLD = fed.output
            if fed.auxiliary is not None:
                auxiliary = auxiliary + fed.auxiliary
            if fed.statistics is not None:
                statistics.append(fed.statistics)
            if fed.kept is not None:
                kept.append(fed.kept)
            if watched_BL is not None:
                squares.append(_square_sum(x_BLD.detach(), at_BL=watched_BL))
        tables = (
            torch.stack(each) if each else nothing.new_empty(0) for each in (statistics, kept)
        )
        return Stacked(x_BLD, torch.cat(squares), auxiliary, *tables)

    def compile_blocks(self) -> None:
        """Compile every block at its first call; equal blocks share what is compiled."""
        for block in self:
            block.forward = torch.compile(block.forward, dynamic=self.rows_change)


def _square_sum(x_BLD: Tensor, *, at_BL: Tensor) -> Tensor:
    """float32[1], without a copy of x in float32."""
    norm_BL = torch.linalg.vector_norm(x_BLD, dim=-1, dtype=torch.float32)
    return (norm_BL.square() * at_BL).sum()[None]
