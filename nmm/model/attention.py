"""Attention inside packed documents: rotary positions, and the layer that a plan serves.

Legend of shape suffixes: B rows, L tokens of a row, D width, H heads, E channels of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmm.config import ModelConfig
from nmm.model.layers import norm
from nmm.model.plan import Plan


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


class Attention(nn.Module):
    """Multi-head attention without biases; q and k are normed over the full width, then rotated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = norm(config.width, eps=config.norm_eps)
            self.k_norm = norm(config.width, eps=config.norm_eps)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BLD: Tensor, *, rotary: Rotary, plan: Plan) -> Tensor:
        q_BLD, k_BLD, v_BLD = self.qkv(x_BLD).chunk(3, dim=-1)
        q_BLHE = rotate(self._split(self.q_norm(q_BLD)), rotary=rotary)
        k_BLHE = rotate(self._split(self.k_norm(k_BLD)), rotary=rotary)
        return self.out(plan.attend(q_BLHE, k_BLHE, self._split(v_BLD)).flatten(2))

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.heads, -1))
