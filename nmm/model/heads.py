"""The output head: logits, or the losses at labelled positions.

Legend of shape suffixes: N positions, D width, V ids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """hidden [N, D] -> logits [N, V]; with labels int64[N] -> float32[N], their losses in nats."""

    def __init__(self, width: int, *, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = F.linear(hidden, self.weight)
        if labels is None:
            return logits
        return F.cross_entropy(logits.float(), labels, reduction="none")
