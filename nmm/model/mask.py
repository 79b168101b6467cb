"""Attention within documents as one call over whole rows, with the mask written out.

Legend of shape suffixes: B rows, L tokens of a row, H heads, K heads of keys and values, E
channels of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nmm.batch import allowed


@dataclass(frozen=True)
class MaskPlan:
    """One SDPA call over whole rows. `bias` [B, 1, L, L] is 0 where allowed, else -inf."""

    bias: Tensor

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        heads, channels = q_BLHE.shape[2:]
        # GPU kernels that take a mask want multiples of 8 channels, and as many heads of all.
        q, k, v = (
            for_heads(with_more_channels(x.transpose(1, 2), more=-channels % 8), heads=heads)
            for x in (q_BLHE, k_BLKE, v_BLKE)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=channels**-0.5)
        return out[..., :channels].transpose(1, 2)


def with_more_channels(x: Tensor, *, more: int) -> Tensor:
    """x with so many more channels of zeros, which change no product; without a copy for none."""
    return F.pad(x, (0, more)) if more else x


def for_heads(x_BKLE: Tensor, *, heads: int) -> Tensor:
    """[B, H, L, E]: every head as often as queries read it; without a copy where each has one."""
    times = heads // x_BKLE.shape[1]
    return x_BKLE if times == 1 else x_BKLE.repeat_interleave(times, dim=1)


def mask_plan(document_BL: Tensor, *, two_way_image_BL: Tensor, dtype: torch.dtype) -> MaskPlan:
    """The mask of a batch; `dtype` is the queries'."""
    return MaskPlan(mask_bias(document_BL, two_way_image_BL, dtype=dtype))


def mask_bias(document_BL: Tensor, two_way_image_BL: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L], 0 or -inf. Padding counts as a document, so that no row is without a key."""
    forbidden = ~allowed(document_BL, two_way_image_BL)
    bias = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
    return bias.masked_fill_(forbidden, float("-inf"))[:, None]
