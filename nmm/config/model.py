"""What is built: the decoder's width, depth and id capacity, and how an image becomes tokens."""

from dataclasses import dataclass, field
from enum import Enum

from nmm.config.check import at_least, positive
from nmm.errors import UserError


class AttentionBackend(Enum):
    """How the packed-document mask is computed; all backends agree (docs/architecture.md).

    auto       flex on GPUs, documents on CPUs
    flex       FlexAttention: blocks of pairs that nobody may see are skipped; trains on GPUs only
    mask       scaled-dot-product attention over whole rows, with the mask written out
    documents  scaled-dot-product attention per document, documents of like length together
    """

    auto = "auto"
    flex = "flex"
    mask = "mask"
    documents = "documents"


class ImageAttention(Enum):
    """Which images see all of themselves; text, and the patches of other images, are causal.

    block   every image
    prefix  the image that begins a document: at most one token (its begin) is before it
    causal  none
    """

    block = "block"
    prefix = "prefix"
    causal = "causal"


class LossBackend(Enum):
    """How the loss is computed without holding all logits; the backends agree to 1e-4.

    auto     liger on GPUs where liger-kernel is installed, else chunked
    chunked  plain torch, some positions at a time
    liger    the fused kernels of liger-kernel, an optional package; GPUs only
    """

    auto = "auto"
    chunked = "chunked"
    liger = "liger"


@dataclass
class ImageConfig:
    """Images are squares of `side_pixels`, cut into patches of `patch_pixels`."""

    side_pixels: int = 64
    patch_pixels: int = 8

    def __post_init__(self) -> None:
        positive(model__image__side_pixels=self.side_pixels)
        positive(model__image__patch_pixels=self.patch_pixels)
        if self.side_pixels % self.patch_pixels:
            raise UserError(
                f"model.image.side_pixels is {self.side_pixels} and model.image.patch_pixels is "
                f"{self.patch_pixels}; make the side a multiple of the patch."
            )

    @property
    def tokens(self) -> int:
        """Tokens that one image takes in a row."""
        return (self.side_pixels // self.patch_pixels) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened RGB patch."""
        return 3 * self.patch_pixels**2


@dataclass
class ModelConfig:
    """A decoder with SwiGLU, RoPE and untied embeddings.

    It follows "Scaling Laws for Native Multimodal Models", section 2. `vocab_size` is a padded
    capacity, at least as large as the tokenizer's id table. `heads` divide the width; `qk_norm`
    normalises queries and keys over the whole width; `norm_eps` is the epsilon of every norm;
    `rope_theta` is the base of the rotary frequencies. `z_loss` times the squared log-partition of
    the logits is added to the loss that is minimised, not to the one that is logged.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    vocab_size: int = 2048
    qk_norm: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    attention: AttentionBackend = AttentionBackend.auto
    image_attention: ImageAttention = ImageAttention.block
    loss: LossBackend = LossBackend.auto
    z_loss: float = 0.0
    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self) -> None:
        positive(model__width=self.width, model__depth=self.depth, model__heads=self.heads)
        positive(model__vocab_size=self.vocab_size, model__norm_eps=self.norm_eps)
        positive(model__rope_theta=self.rope_theta)
        at_least(0, model__z_loss=self.z_loss)
        if self.width % (2 * self.heads):
            raise UserError(
                f"model.heads is {self.heads} and model.width is {self.width}; the width must be a "
                "multiple of twice the heads, because rotary positions pair the channels of a head."
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def ffn_hidden(self) -> int:
        """SwiGLU hidden size: 8/3 of the width, rounded up to a multiple of 256, as in open_lm."""
        return 256 * -(-int(8 * self.width / 3) // 256)
