"""Parameters, FLOPs and memory as pure functions of the configuration; no torch."""

from dataclasses import asdict, dataclass

from nmm.config import FFN, BlockConfig, ImageAttention, ImageKind, ModelConfig, Norm, QKNorm

TRAINING = 3  # a matrix product costs as much forward as for each of its two gradients
MULTIPLY_ADD = 2


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part; a tied head has none of its own.

    `attention` and `ffn` are matrices, `bias` the vectors that are added to their products, `norm`
    all of the norms. Of experts, `ffn` are as many as a token passes through, on average where they
    choose; `idle_experts` are the others. Where blocks take some tokens only, `attention` and `ffn`
    are what a token passes through on average, and `idle_depth` is what it passes by. Parts that
    begin with `vision` belong to the encoder.
    """

    embedding: int
    attention: int
    ffn: int
    idle_experts: int
    idle_depth: int
    router: int
    auxiliary_router: int
    head: int
    norm: int
    bias: int
    position: int
    patch: int
    connector: int
    vision_attention: int
    vision_ffn: int
    vision_norm: int
    vision_bias: int
    vision_position: int
    vision_patch: int

    @property
    def N(self) -> int:
        """The size that scaling laws use: the matrices of embeddings, blocks and head.

        Positions, patch projections, connector, routers, norms and biases are not in it.
        """
        return self.N_text + self.N_vision

    @property
    def N_active(self) -> int:
        """The part of N that one image token passes through: all of it in a dense model."""
        return self.N - self.idle_experts - self.idle_depth

    @property
    def N_text(self) -> int:
        """The decoder's part of N; without what is idle, what a text token passes through."""
        blocks = self.attention + self.ffn + self.idle_experts + self.idle_depth
        return self.embedding + blocks + self.head

    @property
    def N_vision(self) -> int:
        """The vision encoder's part of N; early fusion has none."""
        return self.vision_attention + self.vision_ffn

    @property
    def vision(self) -> int:
        """Every parameter of the vision encoder: what the encoder's learning rate trains."""
        return sum(count for part, count in asdict(self).items() if part.startswith("vision"))

    @property
    def total(self) -> int:
        """Every parameter of the built module."""
        return sum(asdict(self).values())


def num_parameters(config: ModelConfig) -> Parameters:
    """Count without building: agrees with the module to the last parameter."""
    width, vision = config.width, config.encoder
    early = config.image.kind is ImageKind.patches
    moe = config.sparse
    experts = config.depth * moe.total_experts * _expert(config) if moe else 0
    active = round(experts * moe.active_fraction) if moe else config.depth * _ffn(config)
    attention, passed_by = config.depth * _attention(config), _passed_by(config)
    idle = round(attention * passed_by), round(active * passed_by)
    return Parameters(
        embedding=config.vocab_size * width,
        attention=attention - idle[0],
        ffn=active - idle[1],
        idle_experts=experts - active if moe else 0,
        idle_depth=sum(idle),
        router=config.depth * _router(config) + config.mod.layers(config.depth) * config.width,
        auxiliary_router=sum(first + second for first, second, _ in _auxiliary_routers(config)),
        head=0 if config.tied_head else config.vocab_size * width,
        norm=_norms(config),
        bias=_biases(config),
        position=(config.max_positions or 0) * width,
        patch=config.image.patch_values * width if early else 0,
        connector=(vision.width + config.biases) * width if vision else 0,
        vision_attention=vision.depth * _attention(vision) if vision else 0,
        vision_ffn=vision.depth * _ffn(vision) if vision else 0,
        vision_norm=_norms(vision) if vision else 0,
        vision_bias=_biases(vision) if vision else 0,
        vision_position=config.image.tokens * vision.width if vision else 0,
        vision_patch=config.image.patch_values * vision.width if vision else 0,
    )


def _attention(config: BlockConfig) -> int:
    """The matrices of one attention layer."""
    return 2 * config.width * (config.width + config.key_width)


def _ffn(config: BlockConfig) -> int:
    """The matrices of one feed-forward layer."""
    return (3 if config.ffn is FFN.swiglu else 2) * config.width * config.hidden


def _expert(config: ModelConfig) -> int:
    """The matrices of one expert."""
    return 3 * config.width * config.expert_hidden


def _router(config: ModelConfig) -> int:
    """The matrix of one layer's router of experts."""
    moe = config.sparse
    return config.width * moe.total_experts if moe and moe.has_router else 0


def _auxiliary_routers(config: ModelConfig) -> list[tuple[int, int, float]]:
    """First matrices, second matrices and the fraction of tokens they see: of experts, of depth."""
    half, moe, mod = config.width // 2, config.moe, config.mod
    found = []
    if moe.auxiliary_routers:
        first, second = len(moe.sizes) * config.width * half, moe.total_experts * half
        found.append((config.depth * first, config.depth * second, 1 - _passed_by(config)))
    if mod.auxiliary_router:
        layers = mod.layers(config.depth)
        found.append((layers * config.width * half, layers * half, 1.0))
    return found


def _passed_by(config: ModelConfig) -> float:
    """The fraction of all blocks that a token passes by, on average."""
    return config.mod.layers(config.depth) / config.depth * (1 - config.mod.capacity)


def _norms(config: BlockConfig) -> int:
    """Gains and biases of all blocks' norms and of the one behind them."""
    each = 2 if config.norm is Norm.layer_norm and config.biases else 1
    queries_and_keys = {
        QKNorm.none: 0,
        QKNorm.full: each * (config.width + config.key_width),
        QKNorm.head: 4 * config.head_dim,
    }
    block = 2 * each * config.width + queries_and_keys[config.qk_norm]
    return config.depth * block + each * config.width


def _biases(config: BlockConfig) -> int:
    """Biases of all blocks' matrices: queries, keys, values, output; feed-forward in and out."""
    inner = (2 if config.ffn is FFN.swiglu else 1) * config.hidden
    outer = 3 * config.width + 2 * config.key_width
    return config.depth * (outer + inner) if config.biases else 0


def flops_per_token(config: ModelConfig, *, is_image: bool = False) -> int:
    """Training FLOPs of a token by the convention of `flops`."""
    return flops(config, tokens=1, image_tokens=int(is_image))


def flops(config: ModelConfig, *, tokens: int, image_tokens: int) -> int:
    """Training FLOPs by the convention C = 6 (N_v D_v + N D), which leaves attention scores out.

    D are all `tokens`, D_v the `image_tokens` among them, which a vision encoder has read ("Scaling
    Laws for Native Multimodal Models", section 2.2). A frozen encoder counts like a trained one; of
    experts and blocks those count that a token passes through. A model that is frozen for its
    auxiliary routers costs its way forward alone, 2 in place of 6; routers are in no N.
    """
    parameters = num_parameters(config)
    decoder = parameters.N_text - parameters.idle_experts - parameters.idle_depth
    each = MULTIPLY_ADD * (1 if config.auxiliary_routers else TRAINING)
    return each * (parameters.N_vision * image_tokens + decoder * tokens)


def exact_flops(
    config: ModelConfig, *, tokens: int, image_tokens: int, labels: int, pairs: int
) -> int:
    """Training FLOPs of all matrix products, those of attention scores too.

    `image_tokens` are among the `tokens`, `pairs` are the (query, key) pairs that the mask allows,
    and the head computes logits at `labels` positions only. Pixels need no gradient. Of a block
    that takes some tokens these are its capacity, and of its pairs the square of it, as if drawn;
    the scores that it takes them by are no matrix products.
    """
    parameters, vision, image = num_parameters(config), config.encoder, config.image
    picking, capacity = config.mod.layers(config.depth), config.mod.capacity
    routers = config.depth * _router(config) * (1 - _passed_by(config))
    forward = (parameters.attention + parameters.ffn + routers) * tokens
    seeing = config.depth - picking * (1 - capacity**2)
    forward += 2 * seeing * config.width * pairs
    forward += config.vocab_size * config.width * labels
    pixels = (parameters.patch + parameters.vision_patch) * image_tokens
    if vision:
        forward += (parameters.N_vision + vision.width * config.width) * image_tokens
        forward += 2 * vision.depth * vision.width * image.tokens * image_tokens
    if config.auxiliary_routers:
        # Frozen but for these, whose input needs no gradient.
        trained = sum(
            ((TRAINING - 1) * first + TRAINING * second) * seen * tokens
            for first, second, seen in _auxiliary_routers(config)
        )
        return round(MULTIPLY_ADD * (forward + pixels + trained))
    return round(MULTIPLY_ADD * (TRAINING * forward + (TRAINING - 1) * pixels))


def exact_flops_per_token(
    config: ModelConfig, *, context_tokens: int, is_image: bool = False
) -> int:
    """Mean of `exact_flops` over places in documents of `context_tokens`; a text token is labelled.

    A token sees (context + 1) / 2 of its document on average; a token of an image that sees all of
    itself also the (tokens of the image - 1) / 2 that follow. Computed for two tokens at a time.
    """
    whole = is_image and config.image_attention is not ImageAttention.causal
    pairs = context_tokens + 1 + (config.image.tokens - 1 if whole else 0)
    labels, image_tokens = (0, 2) if is_image else (2, 0)
    return exact_flops(config, tokens=2, image_tokens=image_tokens, labels=labels, pairs=pairs) // 2


def memory_bytes(
    parameters: int,
    *,
    zero_stage: int,
    gpus: int,
    frozen: int = 0,
    experts: int = 0,
    expert_parallel: int = 1,
) -> float:
    """Bytes per GPU for weights, gradients and Adam's states; activations are not included.

    bf16 weights and gradients (2 + 2) with float32 master weights and two moments (12); stage 1
    splits the 12 over the GPUs, stage 2 the gradients too, stage 3 everything. Stage 0 trains in
    fp32 only and takes the same 16 bytes (4 + 4 + 8).

    Of the `parameters`, `frozen` ones are weights and nothing else, and `experts` are divided over
    groups of `expert_parallel` GPUs, so that their states are split over fewer.
    """
    split = {0: 0, 1: 12, 2: 14, 3: 16}[zero_stage]

    def trained(count: float, *, over: float) -> float:
        return count * (16 - split + split / over)

    weight_bytes = {0: 4, 1: 2, 2: 2, 3: 2 / gpus}[zero_stage]
    return (
        trained(parameters - frozen - experts, over=gpus)
        + trained(experts / expert_parallel, over=gpus / expert_parallel)
        + frozen * weight_bytes
    )


def state_bytes(
    config: ModelConfig, *, zero_stage: int, gpus: int, expert_parallel: int = 1, frozen: int = 0
) -> float:
    """`memory_bytes` of a model, whose experts are divided over `expert_parallel` GPUs."""
    parameters = num_parameters(config)
    trains_experts = config.sparse and not config.auxiliary_routers
    return memory_bytes(
        parameters.total,
        zero_stage=zero_stage,
        gpus=gpus,
        frozen=frozen,
        experts=parameters.ffn + parameters.idle_experts if trains_experts else 0,
        expert_parallel=expert_parallel,
    )


# Dense bf16 figures of the vendor's data sheets; the first name found in the device's name counts.
PEAK_FLOPS_PER_SECOND = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
}


def peak_flops_per_second(device_name: str) -> float | None:
    """What the accelerator of this name can do at most in bf16; None where we do not know."""
    return next((peak for name, peak in PEAK_FLOPS_PER_SECOND.items() if name in device_name), None)
