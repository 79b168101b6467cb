"""A native multimodal decoder for `transformers`, complete in this file.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor([["A:", image, "B:"]])
    print(processor.decode(model.generate(**inputs, max_new_tokens=40)[0]))

Text and images are tokens of one stream. Text is causal; the tokens of an image see each other
where `image_attention` lets them. Early fusion brings patches in by one linear layer, late fusion
by a vision transformer. Parameters have the names that they were trained under.
Legend of shape suffixes: B rows, L tokens given, K tokens with those of the cache before them, D
width, H heads, E channels of a head, S heads of keys and values, F hidden size of the feed-forward,
M images, T tokens of one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Mean and standard deviation of ImageNet's RGB channels, the convention of vision models.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

Turns = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Blocks:
    """Blocks of the decoder or the vision encoder; keys are named as in the training's `model`."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    norm: str
    norm_position: str
    norm_eps: float
    qk_norm: str
    ffn: str
    ffn_hidden: int
    biases: bool
    dropout: float


class NmmConfig(PreTrainedConfig):
    """`blocks` and `vision` are keys of Blocks; an image has `side_pixels`, 0 if there are none.

    `image_attention` is block (every image sees all of itself), prefix (only one that begins its
    document, behind one token at most) or causal (none).
    `positions` is rope or learned; `max_positions` is the length of the learned table.
    """

    model_type = "nmm"
    keys_to_ignore_at_inference = ("past_key_values",)

    blocks: dict | None = None
    vision: dict | None = None
    vocab_size: int = 0
    image_attention: str = "block"
    positions: str = "rope"
    rope_theta: float = 10_000.0
    max_positions: int | None = None
    side_pixels: int = 0
    patch_pixels: int = 1
    image_token_id: int = 0

    @property
    def image_tokens(self) -> int:
        return (self.side_pixels // self.patch_pixels) ** 2

    @property
    def hidden_size(self) -> int:
        return (self.blocks or {}).get("width", 0)

    @property
    def num_hidden_layers(self) -> int:
        return (self.blocks or {}).get("depth", 0)

    @property
    def num_attention_heads(self) -> int:
        return (self.blocks or {}).get("heads", 0)

    @property
    def num_key_value_heads(self) -> int:
        return (self.blocks or {}).get("kv_heads", 0)


class PatchEmbedding(nn.Module):
    """uint8 pixels [M, side, side, 3] -> [M, T, D], patches in reading order."""

    def __init__(self, config: NmmConfig, *, width: int) -> None:
        super().__init__()
        self.patch_pixels = config.patch_pixels
        self.weight = nn.Parameter(torch.empty(width, 3 * config.patch_pixels**2))

    def forward(self, pixels: Tensor) -> Tensor:
        mean = torch.tensor(PIXEL_MEAN, device=pixels.device)
        std = torch.tensor(PIXEL_STD, device=pixels.device)
        normalised = ((pixels.float() / 255 - mean) / std).to(self.weight.dtype)
        images, side = pixels.shape[:2]
        across = side // self.patch_pixels
        grid = normalised.view(images, across, self.patch_pixels, across, self.patch_pixels, 3)
        return F.linear(grid.transpose(2, 3).reshape(images, across**2, -1), self.weight)


class HeadNorm(nn.LayerNorm):
    """[D] -> [D]: a layer norm of every head's channels, with one gain [E] and bias [E] for all."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unflatten(-1, (-1, *self.normalized_shape))).flatten(-2)


class Attention(nn.Module):
    """q and k are normed, then rotated unless `turns` is None."""

    def __init__(self, blocks: Blocks, layer: int) -> None:
        super().__init__()
        self.channels, self.layer = blocks.width // blocks.heads, layer
        self.times = blocks.heads // blocks.kv_heads
        keys = blocks.kv_heads * self.channels
        self.widths = (blocks.width, keys, keys)
        self.qkv = nn.Linear(blocks.width, sum(self.widths), bias=blocks.biases)
        self.q_norm, self.k_norm = qk_norm(blocks, width=blocks.width), qk_norm(blocks, width=keys)
        self.out = nn.Linear(blocks.width, blocks.width, bias=blocks.biases)

    def forward(self, x_BLD: Tensor, turns: Turns, mask: Tensor | None, cache) -> Tensor:
        q_BLD, k_BLS, v_BLS = self.qkv(x_BLD).split(self.widths, dim=-1)
        q, k = self._split(self.q_norm(q_BLD)), self._split(self.k_norm(k_BLS))
        v = self._split(v_BLS)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if self.times > 1:  # a head of keys and values serves neighbouring heads of queries
            k, v = (x.repeat_interleave(self.times, dim=1) for x in (k, v))
        out_BHLE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out_BHLE.transpose(1, 2).flatten(2))

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (-1, self.channels)).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, gate first."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.gate_up = nn.Linear(blocks.width, 2 * blocks.ffn_hidden, bias=blocks.biases)
        self.down = nn.Linear(blocks.ffn_hidden, blocks.width, bias=blocks.biases)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.gate_up(x_BLD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BLF) * up_BLF)


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, blocks: Blocks, activation: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(blocks.width, blocks.ffn_hidden, bias=blocks.biases)
        self.down = nn.Linear(blocks.ffn_hidden, blocks.width, bias=blocks.biases)
        self.activation = activation

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BLD)))


class Block(nn.Module):
    """x + f(norm(x)) with f = attention, then with f = feed-forward; x + norm(f(x)) for swin."""

    def __init__(self, blocks: Blocks, layer: int) -> None:
        super().__init__()
        self.norms_first = blocks.norm_position == "pre"
        self.attention_norm = norm(blocks)
        self.attention = Attention(blocks, layer)
        self.ffn_norm = norm(blocks)
        self.ffn = feed_forward(blocks)
        self.dropout = nn.Dropout(blocks.dropout)

    def forward(self, x_BLD: Tensor, turns: Turns, mask: Tensor | None, cache) -> Tensor:
        if self.norms_first:
            attended = self.attention(self.attention_norm(x_BLD), turns, mask, cache)
            x_BLD = x_BLD + self.dropout(attended)
            return x_BLD + self.dropout(self.ffn(self.ffn_norm(x_BLD)))
        attended = self.attention(x_BLD, turns, mask, cache)
        x_BLD = x_BLD + self.attention_norm(self.dropout(attended))
        return x_BLD + self.ffn_norm(self.dropout(self.ffn(x_BLD)))


class VisionEncoder(nn.Module):
    """uint8 pixels [M, side, side, 3] -> [M, T, D]; every patch sees all of its image."""

    def __init__(self, config: NmmConfig, blocks: Blocks) -> None:
        super().__init__()
        self.patch = PatchEmbedding(config, width=blocks.width)
        self.position = nn.Parameter(torch.empty(config.image_tokens, blocks.width))
        self.blocks = nn.ModuleList([Block(blocks, layer) for layer in range(blocks.depth)])
        self.norm = norm(blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        x_MTD = self.patch(pixels) + self.position
        for block in self.blocks:
            x_MTD = block(x_MTD, None, None, None)
        return self.norm(x_MTD)


class Head(nn.Module):
    """[.., D] -> logits [.., V]."""

    def __init__(self, vocab_size: int, *, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


def norm(blocks: Blocks, *, width: int | None = None) -> nn.Module:
    width = blocks.width if width is None else width
    if blocks.norm == "rms":
        return nn.RMSNorm(width, eps=blocks.norm_eps)
    return nn.LayerNorm(width, eps=blocks.norm_eps, bias=blocks.biases)


def qk_norm(blocks: Blocks, *, width: int) -> nn.Module:
    """full: over the whole width, before heads are split; head: over the channels of each."""
    if blocks.qk_norm == "none":
        return nn.Identity()
    if blocks.qk_norm == "full":
        return norm(blocks, width=width)
    return HeadNorm(blocks.width // blocks.heads, eps=blocks.norm_eps)


def feed_forward(blocks: Blocks) -> nn.Module:
    if blocks.ffn == "swiglu":
        return SwiGLU(blocks)
    return MLP(blocks, nn.GELU() if blocks.ffn == "gelu" else nn.ReLU())


def rotary(position_BL: Tensor, *, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, float32[B, 1, L, E/2]."""
    half = torch.arange(channels // 2, dtype=torch.float32, device=position_BL.device)
    angle = position_BL.float()[:, None, :, None] * theta ** (-2 * half / channels)
    return angle.cos(), angle.sin()


def rotate(x_BHLE: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (i, i + E/2) by the position's angles, in float32; keeps the dtype."""
    cos, sin = turns
    first, second = x_BHLE.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x_BHLE.dtype)


def image_numbers(is_image_BL: Tensor, tokens: int) -> Tensor:
    """int64[B, L]: 1 for a row's first image, 2 for its second; 0 elsewhere."""
    return ((is_image_BL.cumsum(dim=1) - 1) // max(tokens, 1) + 1) * is_image_BL


def two_way(image_BL: Tensor, position_BL: Tensor, *, attention: str) -> Tensor:
    """`image` with 0 for those whose tokens see only what is before them.

    For prefix: is the first token of the image at position 0 or 1?
    """
    if attention == "block":
        return image_BL
    if attention == "causal":
        return torch.zeros_like(image_BL)
    same = image_BL[:, :, None] == image_BL[:, None, :]
    first_BL = torch.where(same, position_BL[:, None, :], torch.inf).amin(dim=2)
    return image_BL * (first_BL <= 1)


def attention_mask_of(real_BK: Tensor, image_BL: Tensor) -> Tensor:
    """bool[B, 1, L, K]: may a given token attend to this one? To itself always.

    To real tokens before it, and to all of its image. `image` is 0 where a token has none, or does
    not see all of it.
    """
    length, total = image_BL.shape[1], real_BK.shape[1]
    at_K = torch.arange(total, device=real_BK.device)
    at_L = at_K[total - length :, None]
    same_image = (image_BL[:, :, None] == image_BL[:, None, :]) & (image_BL > 0)[:, :, None]
    seen = (at_K <= at_L) | F.pad(same_image, (total - length, 0))
    return ((seen & real_BK.bool()[:, None, :]) | (at_K == at_L))[:, None]


class NmmForCausalLM(PreTrainedModel, GenerationMixin):
    """Ids and pixels in, logits of the next ids out."""

    config: NmmConfig
    config_class = NmmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads them from the class
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: NmmConfig) -> None:
        super().__init__(config)
        decoder = Blocks(**(config.blocks or {}))
        self.channels = decoder.width // decoder.heads
        self.embedding = nn.Embedding(config.vocab_size, decoder.width)
        self.position = self.patch = self.vision = self.connector = None
        if config.max_positions is not None:
            self.position = nn.Embedding(config.max_positions, decoder.width)
        if config.vision is not None:
            encoder = Blocks(**config.vision)
            self.vision = VisionEncoder(config, encoder)
            self.connector = nn.Linear(encoder.width, decoder.width, bias=decoder.biases)
        elif config.image_tokens:
            self.patch = PatchEmbedding(config, width=decoder.width)
        self.blocks = nn.ModuleList([Block(decoder, layer) for layer in range(decoder.depth)])
        self.norm = norm(decoder)
        self.head = Head(config.vocab_size, width=decoder.width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values=None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """`pixel_values` uint8[M, side, side, 3] in the order of their places in `input_ids`.

        An image takes `image_tokens` positions that hold `image_token_id`. `attention_mask`
        int[B, K] is 0 at padding. Labels are ids, -100 where there is none; they are shifted here.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        total = past + input_ids.shape[1]
        real_BK = input_ids.new_ones(len(input_ids), total)
        if attention_mask is not None:
            real_BK = attention_mask
        if position_ids is None:
            position_ids = (real_BK.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        is_image = input_ids == self.config.image_token_id
        if past and not is_image.any():
            pixel_values = None  # `generate` hands the prompt's images to every step
        x_BLD = self._embed(input_ids, is_image, pixel_values)
        if self.position is not None:
            x_BLD = x_BLD + self.position(position_ids)
        image_BL = image_numbers(is_image, self.config.image_tokens)
        image_BL = two_way(image_BL, position_ids, attention=self.config.image_attention)
        mask = attention_mask_of(real_BK, image_BL)
        turns = None
        if self.config.positions == "rope":
            turns = rotary(position_ids, channels=self.channels, theta=self.config.rope_theta)
        for block in self.blocks:
            x_BLD = block(x_BLD, turns, mask, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.norm(x_BLD)[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _embed(self, input_ids: Tensor, is_image: Tensor, pixel_values: Tensor | None) -> Tensor:
        images = 0 if pixel_values is None else len(pixel_values)
        if int(is_image.sum()) != images * self.config.image_tokens:
            raise ValueError(
                f"input_ids has {int(is_image.sum())} image positions and pixel_values has "
                f"{images} images of {self.config.image_tokens} tokens each; let the processor "
                f"make both."
            )
        x_BLD = self.embedding(input_ids)
        if pixel_values is None:
            return x_BLD
        if self.vision is not None and self.connector is not None:
            images_MTD = self.connector(self.vision(pixel_values))
        else:
            assert self.patch is not None
            images_MTD = self.patch(pixel_values)
        return x_BLD.masked_scatter(is_image[..., None], images_MTD)
