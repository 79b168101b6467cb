"""Attention within documents by FlexAttention, which skips blocks of pairs that nobody may see.

Legend of shape suffixes: B rows, L tokens of a row, H heads, K heads of keys and values, E
channels of a head, N blocks of a row.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nmm.batch import first_column, pair_rule
from nmm.model.mask import with_more_channels

BLOCK_TOKENS = 128  # what the kernels of FlexAttention are tuned for
LEAST_CHANNELS = 16  # of a head; their matrix products take no fewer


@dataclass(frozen=True)
class FlexPlan:
    """One fused kernel over whole rows, with the blocks of pairs that it has to look at."""

    blocks: BlockMask

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        channels = q_BLHE.shape[-1]
        more = max(0, LEAST_CHANNELS - channels)
        # NOTE: contiguous, because torch 2.13 compiles a transposed view of a computed tensor into
        # wrong numbers here, without an error (seen on a CPU; LOG.md).
        q, k, v = (
            with_more_channels(x.transpose(1, 2), more=more).contiguous()
            for x in (q_BLHE, k_BLKE, v_BLKE)
        )
        fewer, scale = k.shape[1] < q.shape[1], channels**-0.5
        out = _kernel(q)(q, k, v, block_mask=self.blocks, scale=scale, enable_gqa=fewer)
        return out[..., :channels].transpose(1, 2)


def _kernel(q: Tensor) -> Callable[..., Tensor]:
    if torch.compiler.is_compiling():  # then FlexAttention is compiled with what is around it
        return flex_attention
    return _compiled() if q.is_cuda else _uncompiled


@cache
def _compiled() -> Callable[..., Tensor]:
    """One kernel for each shape of the batch; built at the first call, because that takes long."""
    return torch.compile(flex_attention, dynamic=False)


def _uncompiled(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, scale: float, enable_gqa: bool
) -> Tensor:
    """For CPUs, where there is no backward and nothing to gain: the whole matrix of scores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out = flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa)
    assert isinstance(out, Tensor)
    return out


def flex_plan(document_BL: Tensor, *, two_way_image_BL: Tensor) -> FlexPlan:
    """The blocks of a batch, found without looking at pairs: 64 a row of 8,192 tokens, squared."""
    # Documents by where they begin, so that padding inside a row is a document of its own.
    begin_BL = first_column(document_BL)
    rule = pair_rule(begin_BL, two_way_image_BL)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule(b, q, k)

    some_BNN, all_BNN = blocks(begin_BL, two_way_image_BL)
    partial_counts, partial_order = _ordered(some_BNN & ~all_BNN)
    full_counts, full_order = _ordered(all_BNN)
    length = document_BL.shape[1]
    return FlexPlan(
        BlockMask.from_kv_blocks(
            partial_counts,
            partial_order,
            full_counts,
            full_order,
            BLOCK_SIZE=BLOCK_TOKENS,
            mask_mod=mask,
            seq_lengths=(length, length),
        )
    )


def blocks(begin_BL: Tensor, two_way_image_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Two bool[B, N, N]: may some, may all queries of a block attend to keys of another?

    Documents and images are contiguous, so the first and last position of a block say all. Blocks
    of 4, two documents (0 and 5), an image of 5 tokens in the second:

        document  0 0 0 0 | 0 5 5 5 | 5 5 5 5        some  1 . .      all  . . .
        image     0 0 0 0 | 0 0 1 1 | 1 1 1 0              1 1 1           . . .
                                                           . 1 1           . . .
    """
    fill = -begin_BL.shape[1] % BLOCK_TOKENS
    # What fills up the last block is a document of its own there.
    begin = F.pad(begin_BL, (0, fill), value=begin_BL.shape[1])
    image = F.pad(two_way_image_BL, (0, fill))
    first, last = slice(None, None, BLOCK_TOKENS), slice(BLOCK_TOKENS - 1, None, BLOCK_TOKENS)
    first_document, last_document = begin[:, first], begin[:, last]
    first_image, last_image = image[:, first], image[:, last]

    block = torch.arange(first_document.shape[1], device=begin.device)
    before, same = block[:, None] > block, block[:, None] == block
    # A document that is in an earlier block and in this one covers this block's first position.
    one_document = first_document[:, :, None] == last_document[:, None, :]
    reaches = last_image[:, :, None] == first_image[:, None, :]
    reaches = reaches & (last_image > 0)[:, :, None]
    some = same | torch.where(before, one_document, reaches)

    whole_document = last_document[:, :, None] == first_document[:, None, :]
    whole_image = first_image[:, :, None] == last_image[:, None, :]
    whole_image = whole_image & (first_image > 0)[:, :, None]
    return some, torch.where(before, whole_document, whole_image)


def _ordered(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """int32[B, 1, N] and int32[B, 1, N, N]: how many are chosen in a line, and they come first."""
    counts = chosen_BNN.sum(dim=-1, dtype=torch.int32)
    order = chosen_BNN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[:, None], order.to(torch.int32)[:, None]
