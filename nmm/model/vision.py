"""The vision transformer of late fusion.

Legend of shape suffixes: M images, T tokens of an image, D width of the encoder, H heads, E
channels of a head, K heads of keys and values.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmm.config import ImageConfig, VisionConfig
from nmm.model.block import Block, Stack
from nmm.model.image import PatchEmbedding
from nmm.model.layers import feed_forward, norm


@dataclass(frozen=True)
class WholeImages:
    """Every patch of an image attends to all patches of it."""

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BLKE, v_BLKE))
        fewer = k.shape[1] < q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=fewer).transpose(1, 2)


class VisionEncoder(nn.Module):
    """uint8 pixels [M, side, side, 3] -> [M, T, D].

    Patches and their positions, the blocks, a final norm. Without images it encodes a black one
    into [1, T, D]: every process runs every module at every step, no kernel gets an empty batch.
    """

    def __init__(self, config: VisionConfig, *, image: ImageConfig) -> None:
        super().__init__()
        self.patch = PatchEmbedding(image, width=config.width)
        self.position = nn.Parameter(torch.empty(image.tokens, config.width))
        self.blocks = Stack([Block(config, ffn=feed_forward(config)) for _ in range(config.depth)])
        self.blocks.rows_change = True
        self.norm = norm(config)

    def forward(self, pixels: Tensor) -> Tensor:
        if len(pixels) == 0:
            pixels = pixels.new_zeros(1, *pixels.shape[1:])
        x_MTD = self.patch(pixels) + self.position
        stacked = self.blocks(x_MTD, rotary=None, plan=WholeImages())
        return self.norm(stacked.output)
