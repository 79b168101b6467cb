"""Parameters, FLOPs and memory as pure functions of the configuration; no torch."""

from dataclasses import dataclass

from nmm.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part; `embedding` and `head` are the two untied id matrices."""

    embedding: int
    patch: int
    attention: int
    ffn: int
    norm: int
    head: int

    @property
    def N(self) -> int:
        """The size that scaling laws use: embeddings in, patch projection and norms out."""
        return self.embedding + self.attention + self.ffn + self.head

    @property
    def N_active(self) -> int:
        """The part of N that one token passes through: all of it in a dense model."""
        return self.N

    @property
    def N_vision(self) -> int:
        """The vision encoder's part: early fusion has none."""
        return 0

    @property
    def total(self) -> int:
        """Every parameter of the built module."""
        return self.N + self.patch + self.norm


def num_parameters(config: ModelConfig) -> Parameters:
    """Count without building: agrees with the module to the last parameter."""
    width, norms_per_block = config.width, 4 if config.qk_norm else 2
    return Parameters(
        embedding=config.vocab_size * width,
        patch=config.image.patch_values * width,
        attention=config.depth * 4 * width**2,
        ffn=config.depth * 3 * width * config.ffn_hidden,
        norm=(config.depth * norms_per_block + 1) * width,
        head=config.vocab_size * width,
    )


def flops_per_token(config: ModelConfig) -> int:
    """Training FLOPs of a token by the convention C = 6 N D, which leaves attention scores out."""
    return 6 * num_parameters(config).N_active


def memory_bytes(parameters: int, *, zero_stage: int, gpus: int) -> float:
    """Bytes per GPU for weights, gradients and Adam's states; activations are not included.

    bf16 weights and gradients (2 + 2) with float32 master weights and two moments (12); stage 1
    splits the 12 over the GPUs, stage 2 the gradients too, stage 3 everything. Stage 0 trains in
    fp32 only and takes the same 16 bytes (4 + 4 + 8).
    """
    split = {0: 0, 1: 12, 2: 14, 3: 16}[zero_stage]
    return parameters * (16 - split + split / gpus)


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
