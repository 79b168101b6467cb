"""Attention inside packed documents: rotary positions, and the layer that a plan serves.

Legend of shape suffixes: B rows, L tokens of a row, D width, H heads, K heads of keys and values,
E channels of a head.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nmm.config import BlockConfig, ModelConfig
from nmm.model.layers import qk_norm


class Rotary(NamedTuple):
    """cos and sin of every position's angles, float32[B, L, 1, E/2]."""

    cos: Tensor
    sin: Tensor


def rotary(position_BL: Tensor, *, config: ModelConfig) -> Rotary:
    """Tables for `rotate`; computed in every forward pass, because engines cast stored buffers."""
    half = torch.arange(config.head_dim // 2, dtype=torch.float32, device=position_BL.device)
    frequency = config.rope_theta ** (-2 * half / config.head_dim)
    angle = (position_BL.float()[..., None] * frequency)[:, :, None, :]
    return Rotary(angle.cos(), angle.sin())


def rotate(x_BLHE: Tensor, *, rotary: Rotary) -> Tensor:
    """Turn channel pairs (i, i + E/2) by the position's angles, in float32; keeps the dtype."""
    first, second = x_BLHE.float().chunk(2, dim=-1)
    turned = (
        first * rotary.cos - second * rotary.sin,
        second * rotary.cos + first * rotary.sin,
    )
    return torch.cat(turned, dim=-1).to(x_BLHE.dtype)


class Attends(Protocol):
    """What a layer wants of a plan: [B, L, H, E]. Head h of the queries reads head h // (H / K)."""

    def attend(self, q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor) -> Tensor: ...


class Attention(nn.Module):
    """Attention by heads; q and k are normed, then rotated unless `rotary` is None."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.widths = (config.width, config.key_width, config.key_width)
        self.qkv = nn.Linear(config.width, sum(self.widths), bias=config.biases)
        self.q_norm = qk_norm(config, width=config.width)
        self.k_norm = qk_norm(config, width=config.key_width)
        self.out = nn.Linear(config.width, config.width, bias=config.biases)

    def forward(self, x_BLD: Tensor, *, rotary: Rotary | None, plan: Attends) -> Tensor:
        q, k, v = self.qkv(x_BLD).split(self.widths, dim=-1)
        q_BLHE, k_BLKE = self._heads(self.q_norm(q)), self._heads(self.k_norm(k))
        if rotary is not None:
            q_BLHE, k_BLKE = (rotate(x, rotary=rotary) for x in (q_BLHE, k_BLKE))
        return self.out(plan.attend(q_BLHE, k_BLKE, self._heads(v)).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
