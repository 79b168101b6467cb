"""Attention within documents as one call over whole rows, with the mask written out.

Legend of shape suffixes: B rows, L tokens of a row, H heads, E channels of a head.
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

    def attend(self, q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor) -> Tensor:
        channels = q_BLHE.shape[-1]
        # GPU kernels that take a mask want multiples of 8 channels; zeros change no product.
        q, k, v = (F.pad(x.transpose(1, 2), (0, -channels % 8)) for x in (q_BLHE, k_BLHE, v_BLHE))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=channels**-0.5)
        return out[..., :channels].transpose(1, 2)


def mask_plan(document_BL: Tensor, *, two_way_image_BL: Tensor, dtype: torch.dtype) -> MaskPlan:
    """The mask of a batch; `dtype` is the queries'."""
    return MaskPlan(mask_bias(document_BL, two_way_image_BL, dtype=dtype))


def mask_bias(document_BL: Tensor, two_way_image_BL: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L], 0 or -inf. Padding counts as a document, so that no row is without a key."""
    forbidden = ~allowed(document_BL, two_way_image_BL)
    bias = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
    return bias.masked_fill_(forbidden, float("-inf"))[:, None]
