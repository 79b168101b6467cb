"""The layers that every block is made of: norms and feed-forward.

Legend of shape suffixes: D width, F inner size of the feed-forward, E channels of a head; leading
dimensions are free.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from nmm.config import FFN, BlockConfig, Norm, QKNorm


def norm(config: BlockConfig, *, width: int | None = None) -> nn.Module:
    """The block's norm over its width, or over another."""
    width = config.width if width is None else width
    match config.norm:
        case Norm.layer_norm:
            return nn.LayerNorm(width, eps=config.norm_eps, bias=config.biases)
        case Norm.rms:
            return nn.RMSNorm(width, eps=config.norm_eps)


def qk_norm(config: BlockConfig, *, width: int) -> nn.Module:
    """What queries pass through, and keys through another, while their heads are still joined."""
    match config.qk_norm:
        case QKNorm.none:
            return nn.Identity()
        case QKNorm.full:
            return norm(config, width=width)
        case QKNorm.head:
            return HeadNorm(config.head_dim, eps=config.norm_eps)


class HeadNorm(nn.LayerNorm):
    """[D] -> [D]: a layer norm of every head's channels, with one gain [E] and bias [E] for all."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unflatten(-1, (-1, *self.normalized_shape))).flatten(-2)


class Fed(NamedTuple):
    """What a feed-forward layer returns.

    auxiliary   float32 scalar, a loss that is added, summed over tokens; experts only
    statistics  float32[modalities, E + 8], the table of nmm/routing.py; experts only
    kept        float32[modalities, 6], another table there; blocks that take some tokens only
    """

    output: Tensor
    auxiliary: Tensor | None = None
    statistics: Tensor | None = None
    kept: Tensor | None = None


def feed_forward(config: BlockConfig) -> nn.Module:
    """The feed-forward layer that is the same for all tokens, [D] -> [D]."""
    match config.ffn:
        case FFN.swiglu:
            return SwiGLU(config)
        case FFN.gelu:
            return MLP(config, activation=nn.GELU())
        case FFN.relu:
            return MLP(config, activation=nn.ReLU())


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate first."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=config.biases)
        self.down = nn.Linear(config.hidden, config.width, bias=config.biases)

    def forward(self, x_D: Tensor, modality: Tensor | None = None, causal: bool = False) -> Fed:
        gate_F, up_F = self.gate_up(x_D).chunk(2, dim=-1)
        return Fed(self.down(F.silu(gate_F) * up_F))


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: BlockConfig, *, activation: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden, bias=config.biases)
        self.down = nn.Linear(config.hidden, config.width, bias=config.biases)
        self.activation = activation

    def forward(self, x_D: Tensor, modality: Tensor | None = None, causal: bool = False) -> Fed:
        return Fed(self.down(self.activation(self.up(x_D))))
