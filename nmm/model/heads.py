"""The output head: logits, or the losses at labelled positions.

Legend of shape suffixes: N positions, D width, V ids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmm.config import ModelConfig
from nmm.model.loss import Losses, losses


class Head(nn.Module):
    """hidden [N, D] -> logits [N, V]; with labels int64[N] -> their Losses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backend = config.loss
        self.z_loss = config.z_loss
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | Losses:
        if labels is None:
            return F.linear(hidden, self.weight)
        return losses(hidden, self.weight, labels, backend=self.backend, z_loss=self.z_loss)
