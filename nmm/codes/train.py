"""Training a small VQ model on squares of pixels.

The loss of a step is how far the image that comes back is from the one that went in, and how far
latent vectors are from their codes ("Neural Discrete Representation Learning", van den Oord et al.
2017, equation 3). Codes follow the latent vectors by moving averages (appendix A.1 there), on the
unit sphere ("Vector-quantized Image Modeling with Improved VQGAN", Yu et al. 2022, section 3.2).
First comes a plain autoencoder, whose latent vectors then choose the first codes: codes that are
there from the beginning hold the encoder back where it is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmm.codes.model import ImageCodes, build, to_model

if TYPE_CHECKING:
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig

CODE_CHANNELS = 8
PLAIN_FRACTION = 0.25  # of the steps are those of a plain autoencoder
COMMITMENT = 0.25  # weight of the second loss, beta of the paper
DECAY = 0.97  # of the moving averages
DEAD_FRACTION = 0.05  # of its even share: a code with less is given up
REVIVE_EVERY_STEPS, REVIVE_FRACTION = 20, 0.8  # codes are given up in this part of the steps
MEAN_ROUNDS, MEAN_BATCHES = 8, 32  # of the k-means that chooses the first codes
WARMUP_STEPS, LAST_RATE_FRACTION, CLIP_NORM = 50, 0.02, 1.0


@dataclass(frozen=True)
class Recipe:
    """How long and how fast; images are drawn from (seed, step) alone."""

    steps: int
    batch_images: int
    learning_rate: float
    seed: int

    def rate(self, step: int) -> float:
        """A short warmup, then a straight line down; steps count from 0."""
        falling = max(LAST_RATE_FRACTION, 1 - step / self.steps)
        return self.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * falling

    @property
    def plain_steps(self) -> int:
        return int(PLAIN_FRACTION * self.steps)


class Losses(NamedTuple):
    """Of one step: mean absolute difference of pixels in -1 .. 1, squared distance to the codes."""

    image: float
    code: float


def small_config(
    *, side_pixels: int, patch_pixels: int, codes: int, channels: int, blocks: int
) -> "JanusVQVAEConfig":
    """One code for every square of `patch_pixels`, a power of 2."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig

    levels = patch_pixels.bit_length()
    assert patch_pixels == 2 ** (levels - 1), patch_pixels
    return JanusVQVAEConfig(
        embed_dim=CODE_CHANNELS,
        num_embeddings=codes,
        latent_channels=channels,
        base_channels=channels,
        channel_multiplier=[1] * levels,
        num_res_blocks=blocks,
        num_patches=side_pixels // patch_pixels,
    )


class Learner:
    """A model in training; `state` is all that it needs to go on exactly."""

    def __init__(self, config: "JanusVQVAEConfig", recipe: Recipe, *, device: torch.device) -> None:
        self.recipe, self.step_number, self.device = recipe, 0, device
        self.vq = build(config).to(device).train()  # type: ignore[arg-type]
        _initialise(self.vq, seed=recipe.seed)
        self.table = self.vq.quantize.embedding.weight.requires_grad_(False)
        self.counts = torch.zeros(len(self.table), device=device)
        self.sums = torch.zeros_like(self.table)
        learned = [value for value in self.vq.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, images: Tensor) -> Losses:
        """Learn from some of uint8[images, S, S, 3]."""
        step, recipe = self.step_number, self.recipe
        quantised = step >= recipe.plain_steps
        if step == recipe.plain_steps:
            self._choose_codes(images)
        pixels = self._batch(images, draw=step)
        latent = self._latent(pixels)
        vectors = latent.detach().reshape(-1, latent.shape[-1])
        found = nearest(vectors, self.table)
        coded = self.table[found].view_as(latent)
        # The gradient of the coded vectors goes to the latent ones, as if they were the same.
        shown = latent + (coded - latent).detach() if quantised else latent
        difference = self._decoded(shown) - pixels
        image_loss, code_loss = difference.abs().mean(), (latent - coded).square().sum(-1).mean()
        loss = image_loss + difference.square().mean() + COMMITMENT * code_loss * quantised
        self._update(loss, rate=recipe.rate(step))
        if quantised:
            self._move_codes(vectors, found)
        self.step_number += 1
        return Losses(image_loss.item(), code_loss.item())

    def finished(self) -> ImageCodes:
        return ImageCodes(self.vq)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step_number,
            "model": self.vq.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.counts,
            "sums": self.sums,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step_number = state["step"]
        self.vq.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])

    def _batch(self, images: Tensor, *, draw: int) -> Tensor:
        """float32[B, 3, S, S]: those of a step, or for another purpose of a negative number."""
        generator = torch.Generator().manual_seed((self.recipe.seed << 32) + draw)
        chosen = torch.randint(len(images), (self.recipe.batch_images,), generator=generator)
        return to_model(images[chosen].to(self.device))

    def _latent(self, pixels: Tensor) -> Tensor:
        """[B, side, side, C], of length 1."""
        vectors = self.vq.quant_conv(self.vq.encoder(pixels)).permute(0, 2, 3, 1)
        return functional.normalize(vectors, dim=-1)

    def _decoded(self, latent: Tensor) -> Tensor:
        return self.vq.decoder(self.vq.post_quant_conv(latent.permute(0, 3, 1, 2)))

    def _update(self, loss: Tensor, *, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.vq.parameters(), CLIP_NORM)
        self.optimizer.step()

    @torch.no_grad()
    def _choose_codes(self, images: Tensor) -> None:
        """The first codes: centres of what the encoder makes of many images, by k-means."""
        pages = [self._latent(self._batch(images, draw=-1 - n)) for n in range(MEAN_BATCHES)]
        vectors = torch.cat(pages).flatten(0, -2)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        order = torch.randint(len(vectors), (len(self.table),), generator=generator)
        self.table.copy_(vectors[order.to(self.device)])
        for _ in range(MEAN_ROUNDS):
            _, sums = totals(vectors, nearest(vectors, self.table), codes=len(self.table))
            # A code that no vector is nearest to stays.
            self.table.copy_(functional.normalize(sums + 1e-3 * self.table, dim=-1))
        share = pages[0].shape[:-1].numel() / len(self.table)
        self.counts.fill_(share)
        self.sums.copy_(self.table * share)

    @torch.no_grad()
    def _move_codes(self, vectors: Tensor, found: Tensor) -> None:
        """Every code towards its vectors; those that have none begin again at some vector."""
        counts, sums = totals(vectors, found, codes=len(self.table))
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        step, share = self.step_number, len(vectors) / len(self.table)
        dead = self.counts < DEAD_FRACTION * share
        revives = step % REVIVE_EVERY_STEPS == 0 and step < REVIVE_FRACTION * self.recipe.steps
        if revives and dead.any():
            generator = torch.Generator().manual_seed(step)
            chosen = torch.randint(len(vectors), (int(dead.sum()),), generator=generator)
            self.sums[dead] = vectors[chosen.to(self.device)] * share
            self.counts[dead] = share
        self.table.copy_(functional.normalize(self.sums, dim=-1))


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """int64[P]: the row of `table` [K, C] nearest to each of `vectors` [P, C]; all of length 1."""
    return (vectors @ table.T).argmax(-1)


def totals(vectors: Tensor, found: Tensor, *, codes: int) -> tuple[Tensor, Tensor]:
    """float32[K] and [K, C]: how many of `vectors` [P, C] every code has, and their sum."""
    counts = torch.bincount(found, minlength=codes).float()
    sums = vectors.new_zeros(codes, vectors.shape[-1])
    return counts, sums.index_add_(0, found, vectors)


def _initialise(vq: nn.Module, *, seed: int) -> None:
    """Convolutions that keep the scale of what they get, small ones at the end of residuals.

    The scales of transformers are for finetuning: from them a small model hardly begins to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in vq.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            gain = 0.1 if name.endswith(("conv2", "proj_out")) else 1.0
            drawn = torch.randn(module.weight.shape, generator=generator)
            with torch.no_grad():
                module.weight.copy_(drawn * gain / fan_in**0.5)
                assert module.bias is not None
                module.bias.zero_()
