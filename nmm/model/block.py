"""One decoder block: pre-norm attention and pre-norm feed-forward, both residual.

Legend of shape suffixes: B rows, L tokens of a row, D width.
"""

from torch import Tensor, nn

from nmm.config import ModelConfig
from nmm.model.attention import Attention, Rotary
from nmm.model.layers import SwiGLU, norm
from nmm.model.plan import Plan


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = norm(config.width, eps=config.norm_eps)
        self.ffn = SwiGLU(config.width, hidden=config.ffn_hidden)

    def forward(self, x_BLD: Tensor, *, rotary: Rotary, plan: Plan) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rotary=rotary, plan=plan)
        return x_BLD + self.ffn(self.ffn_norm(x_BLD))
