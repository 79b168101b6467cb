"""What is built: the decoder, how an image becomes tokens, and the vision encoder, if any."""

from dataclasses import dataclass, field
from enum import Enum

from nmm.config.block import FFN, BlockConfig
from nmm.config.check import at_least, positive
from nmm.config.mod import MoDConfig
from nmm.config.moe import MoEConfig, Routing
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


class ImageKind(Enum):
    """How an image becomes tokens.

    patches  one linear layer on raw patches: early fusion
    encoder  a vision transformer (model.vision) and a linear connector: late fusion
    codes    it is a run of ids, data.units.image of them, which the model reads and writes
    none     the model reads no images
    """

    patches = "patches"
    encoder = "encoder"
    codes = "codes"
    none = "none"


class Positions(Enum):
    """How a token knows its place in its document: rotated queries and keys, or a learned table."""

    rope = "rope"
    learned = "learned"


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

    kind: ImageKind = ImageKind.patches
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
    def reads_pixels(self) -> bool:
        """Do pixels come into the model? Else side and patches mean nothing."""
        return self.kind in (ImageKind.patches, ImageKind.encoder)

    @property
    def tokens(self) -> int:
        """Tokens that the pixels of one image take in a row."""
        return (self.side_pixels // self.patch_pixels) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened RGB patch."""
        return 3 * self.patch_pixels**2


@dataclass
class VisionConfig(BlockConfig):
    """The vision encoder of late fusion: blocks in which every patch of an image sees all others.

    It reads the patches of model.image, with a learned position for each.
    """

    width: int = 64

    def __post_init__(self) -> None:
        self.check_blocks("model__vision")


@dataclass
class ModelConfig(BlockConfig):
    """The decoder, and how images come into it.

    The defaults follow "Scaling Laws for Native Multimodal Models", section 2. `vocab_size` is a
    padded capacity, at least as large as the tokenizer's id table; `tied_head` makes the ids' input
    matrix their output matrix too. `rope_theta` is the base of the rotary frequencies;
    `max_positions` is the length of the learned table and belongs to positions=learned. `z_loss`
    times the squared log-partition of the logits is added to the loss that is minimised, not to the
    one that is logged. `vision` is built only with image.kind=encoder. With a moe.routing the
    feed-forward layers of the decoder are experts (nmm/config/moe.py); with a mod.every some of its
    blocks take a part of the tokens only (nmm/config/mod.py).
    """

    vocab_size: int = 2048
    tied_head: bool = False
    positions: Positions = Positions.rope
    rope_theta: float = 10_000.0
    max_positions: int | None = None
    attention: AttentionBackend = AttentionBackend.auto
    image_attention: ImageAttention = ImageAttention.block
    loss: LossBackend = LossBackend.auto
    z_loss: float = 0.0
    image: ImageConfig = field(default_factory=ImageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mod: MoDConfig = field(default_factory=MoDConfig)

    def __post_init__(self) -> None:
        self.check_blocks("model")
        positive(model__vocab_size=self.vocab_size, model__rope_theta=self.rope_theta)
        positive(model__max_positions=self.max_positions)
        at_least(0, model__z_loss=self.z_loss)
        self._check_positions()
        self._check_vision()
        self._check_codes()
        self._check_experts()
        self._check_auxiliary_routers()
        self._check_group_rows()

    def _check_positions(self) -> None:
        rope = self.positions is Positions.rope
        if rope and self.head_dim % 2:
            raise UserError(
                f"model.heads is {self.heads} and model.width is {self.width}; the width must be a "
                "multiple of twice the heads, because rotary positions pair the channels of a head."
            )
        if rope and self.max_positions is not None:
            raise UserError(
                f"model.max_positions is {self.max_positions} and model.positions is rope, which "
                f"has no table; set model.max_positions=null, or model.positions=learned."
            )
        if not rope and self.rope_theta != ModelConfig.rope_theta:
            raise UserError(
                f"model.rope_theta is {self.rope_theta} and model.positions is learned, where "
                f"nothing is rotated; leave model.rope_theta out, or set model.positions=rope."
            )
        if not rope and self.max_positions is None:
            raise UserError(
                "model.positions is learned and model.max_positions is null; set it to "
                "data.context_tokens or more."
            )

    def _check_vision(self) -> None:
        kind = self.image.kind
        if kind is not ImageKind.encoder and self.vision != VisionConfig():
            raise UserError(
                f"model.vision is set up and model.image.kind is {kind.name}, so that the encoder "
                f"has no images; set model.image.kind=encoder, or leave model.vision out."
            )

    def _check_codes(self) -> None:
        seen = self.image_attention
        if self.image.kind is ImageKind.codes and seen is not ImageAttention.block:
            raise UserError(
                f"model.image_attention is {seen.name} and model.image.kind is codes, which are "
                f"read one by one, as text is; leave it out, or set model.image.kind=patches."
            )

    def _check_experts(self) -> None:
        if self.sparse is None:
            return
        if self.ffn is not FFN.swiglu or self.biases:
            raise UserError(
                f"model.moe.routing is {self.moe.routing.name}, model.ffn is {self.ffn.name} and "
                f"model.biases is {str(self.biases).lower()}; experts are SwiGLU without biases: "
                f"set model.ffn=swiglu and model.biases=false, or model.moe.routing=none."
            )
        if self.width % 8:
            raise UserError(
                f"model.width is {self.width} and model.moe.routing is {self.moe.routing.name}; "
                f"make the width a multiple of 8, which the kernels of experts want."
            )

    def _check_auxiliary_routers(self) -> None:
        moe, mod = self.moe, self.mod
        if not self.auxiliary_routers:
            return
        key = "moe.auxiliary_routers" if moe.auxiliary_routers else "mod.auxiliary_router"
        if dropout := max(self.dropout, self.vision.dropout):
            raise UserError(
                f"model.{key} is true and a dropout is {dropout}, which would "
                f"change what the frozen model puts out; set model.dropout=0 and "
                f"model.vision.dropout=0."
            )
        if moe.auxiliary_routers and mod.every is not None and not mod.auxiliary_router:
            raise UserError(
                f"model.moe.auxiliary_routers is true and model.mod.every is {mod.every}, whose "
                f"blocks would still look ahead; set model.mod.auxiliary_router=true too."
            )
        if mod.auxiliary_router and moe.chooses_tokens and not moe.auxiliary_routers:
            raise UserError(
                "model.mod.auxiliary_router is true and model.moe.routing is expert_choice, whose "
                "experts would still look ahead; set model.moe.auxiliary_routers=true too."
            )

    def _check_group_rows(self) -> None:
        if self.sparse and self.moe.group_rows % self.mod.group_rows:
            raise UserError(
                f"model.moe.group_rows is {self.moe.group_rows} and model.mod.group_rows is "
                f"{self.mod.group_rows}; make the first a multiple of the second, so that experts "
                f"choose among whole groups of what a block takes."
            )

    @property
    def sparse(self) -> MoEConfig | None:
        """The experts, where there are some."""
        return None if self.moe.routing is Routing.none else self.moe

    @property
    def is_sparse(self) -> bool:
        """Does any token pass by some of the parameters?"""
        return self.sparse is not None or self.mod.every is not None

    @property
    def expert_divisors(self) -> list[int]:
        """What engine.expert_parallel may be while the experts are trained."""
        return self.moe.divisors if self.sparse else [1]

    @property
    def group_rows(self) -> int:
        """Rows of a batch that no split may cut: numbers are taken over as many at a time."""
        return max(self.moe.group_rows, self.mod.group_rows)

    @property
    def looks_ahead(self) -> bool:
        """Does a token's output depend on later tokens, but for auxiliary routers?"""
        return self.moe.chooses_tokens or self.mod.every is not None

    @property
    def auxiliary_routers(self) -> bool:
        """Are there any? They are all that is trained then."""
        return self.moe.auxiliary_routers or self.mod.auxiliary_router

    @property
    def expert_hidden(self) -> int:
        """The inner size of an expert."""
        return self.moe.hidden or self.hidden

    @property
    def encoder(self) -> VisionConfig | None:
        """The vision encoder, where there is one."""
        return self.vision if self.image.kind is ImageKind.encoder else None


@dataclass
class GivenWeights:
    """Weights that a new run begins with, instead of drawing them.

    `decoder` gives all but what brings images in, `vision` the encoder of late fusion. Either is a
    safetensors file with the names of the parameters of nmm/model/, perhaps of a whole model, or a
    folder: an export, and for the decoder also a Llama as `transformers` saves it, or a dense
    open_lm.
    """

    decoder: str | None = None
    vision: str | None = None
