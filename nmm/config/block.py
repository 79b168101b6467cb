"""What a transformer block is made of: fields that decoder and vision encoder have in common."""

from dataclasses import dataclass
from enum import Enum

from nmm.config.check import at_least, positive
from nmm.errors import UserError


class Norm(Enum):
    """layer_norm has a gain, and a bias where `biases` is set; rms never has a bias."""

    layer_norm = "layer_norm"
    rms = "rms"


class NormPosition(Enum):
    """Where a block normalises.

    pre   x + f(norm(x))
    swin  x + norm(f(x)), as in Chameleon 34B and MoMa ("Chameleon", section 2.3.1)
    """

    pre = "pre"
    swin = "swin"


class QKNorm(Enum):
    """What normalises queries and keys before their positions are rotated.

    none
    full  the block's norm over the whole width, before heads are split, as in open_lm
    head  a layer norm with gain and bias over the channels of a head, the same for all heads, as
          in Chameleon
    """

    none = "none"
    full = "full"
    head = "head"


class FFN(Enum):
    """The feed-forward layer: swiglu has three matrices, gelu and relu have two."""

    swiglu = "swiglu"
    gelu = "gelu"
    relu = "relu"


@dataclass
class BlockConfig:
    """`depth` equal blocks.

    `heads` divide the width. Of keys and values there are `kv_heads` heads, each read by as many
    neighbouring heads of queries; null: as many as of queries. `ffn_hidden` is the inner size of
    the feed-forward layer; null: 8/3 of the width rounded up to a multiple of 256 for swiglu, as in
    open_lm, and 4 widths for the others. `norm_eps` is the epsilon of every norm. `biases` gives
    one to every linear layer and layer norm of the blocks. `dropout` is the fraction of numbers
    that training drops behind attention and feed-forward.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int | None = None
    norm: Norm = Norm.layer_norm
    norm_position: NormPosition = NormPosition.pre
    norm_eps: float = 1e-5
    qk_norm: QKNorm = QKNorm.full
    ffn: FFN = FFN.swiglu
    ffn_hidden: int | None = None
    biases: bool = False
    dropout: float = 0.0

    def check_blocks(self, key: str) -> None:
        """Refuse what cannot be built; `key` is where the group lives, e.g. `model__vision`."""
        names = ("width", "depth", "heads", "kv_heads", "ffn_hidden")
        sizes = {name: getattr(self, name) for name in names}
        positive(**{f"{key}__{name}": size for name, size in sizes.items()})
        positive(**{f"{key}__norm_eps": self.norm_eps})
        at_least(0, **{f"{key}__dropout": self.dropout})
        dotted = key.replace("__", ".")
        if self.dropout >= 1:
            raise UserError(
                f"{dotted}.dropout is {self.dropout}; it is a fraction, set it below 1."
            )
        if self.width % self.heads:
            raise UserError(
                f"{dotted}.heads is {self.heads} and {dotted}.width is {self.width}; the heads "
                f"must divide the width."
            )
        if self.heads % self.key_heads:
            raise UserError(
                f"{dotted}.kv_heads is {self.kv_heads} and {dotted}.heads is {self.heads}; make "
                f"the heads a multiple of it, or leave it out."
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys, and of values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_width(self) -> int:
        """Numbers in the keys of a token, and in its values."""
        return self.key_heads * self.head_dim

    @property
    def hidden(self) -> int:
        """The inner size of the feed-forward layer."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        if self.ffn is FFN.swiglu:
            return 256 * -(-int(8 * self.width / 3) // 256)
        return 4 * self.width
