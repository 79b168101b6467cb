"""The output head: logits, or the losses at labelled positions.

Legend of shape suffixes: N positions, D width, V ids.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Linear):
    """hidden [N, D] -> logits [N, V]; with labels int64[N] -> float32[N], each label's loss in nats."""

    def __init__(self, width: int, *, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(hidden)
        if labels is None:
            return logits
        return F.cross_entropy(logits.float(), labels, reduction="none")
