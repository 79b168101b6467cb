"""One block of the decoder or the vision encoder: attention, then feed-forward, both residual.

Legend of shape suffixes: B rows, L tokens of a row, D width.
"""

from torch import Tensor, nn

from nmm.config import BlockConfig, NormPosition
from nmm.model.attention import Attends, Attention, Rotary
from nmm.model.layers import feed_forward, norm


class Block(nn.Module):
    """x + f(norm(x)) with f = attention, then with f = feed-forward; x + norm(f(x)) for swin."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.norms_first = config.norm_position is NormPosition.pre
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.ffn_norm = norm(config)
        self.ffn = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, *, rotary: Rotary | None, plan: Attends) -> Tensor:
        if self.norms_first:
            x_BLD = x_BLD + self._attend(self.attention_norm(x_BLD), rotary=rotary, plan=plan)
            return x_BLD + self.dropout(self.ffn(self.ffn_norm(x_BLD)))
        x_BLD = x_BLD + self.attention_norm(self._attend(x_BLD, rotary=rotary, plan=plan))
        return x_BLD + self.ffn_norm(self.dropout(self.ffn(x_BLD)))

    def _attend(self, x_BLD: Tensor, *, rotary: Rotary | None, plan: Attends) -> Tensor:
        return self.dropout(self.attention(x_BLD, rotary=rotary, plan=plan))
