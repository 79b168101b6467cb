"""Which id comes next: greedy, by temperature, from the most probable part; pure functions.

Legend of shapes: B prompts, V ids.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nmm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn.

    Temperature 0 takes the most probable id. `top_p` below 1 keeps the most probable ids that make
    up this fraction of the probability together, at least one (Holtzman et al. 2020, section 3.1).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature is {self.temperature}; give 0, which takes the most probable id, "
                f"or more."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it is a fraction, set it above 0, up to 1.")
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(
                f"--top-p is {self.top_p} but --temperature is 0, which takes the most probable "
                f"id; set --temperature above 0, or leave --top-p out."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}; set it between 0 and 2**63.")


def choose(logits: Tensor, *, allowed: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """int64[B]: the next id of every prompt, one of those that bool[B, V] or [V] `allowed` names.

    `uniform` float64[B] in [0, 1) says where in the distribution. Ids keep their order there, so
    that rounding moves the borders between them by as little as it moves their probabilities.
    Raises UserError where the logits are no numbers.
    """
    kept = logits.float().masked_fill(~allowed, -math.inf)
    best = kept.max(dim=-1, keepdim=True)
    if not best.values.isfinite().all():
        raise UserError(
            "the model's logits are not numbers, so its training has diverged; give an earlier "
            "--step, or another run."
        )
    if sampling.temperature == 0:
        return best.indices[:, 0]
    probabilities = ((kept - best.values).double() / sampling.temperature).softmax(dim=-1)
    upto = most_probable(probabilities, fraction=sampling.top_p).cumsum(dim=-1)
    return torch.searchsorted(upto, uniform[:, None] * upto[:, -1:], right=True)[:, 0]


def most_probable(probabilities: Tensor, *, fraction: float) -> Tensor:
    """[B, V]: zero but for the fewest ids, most probable first, that reach `fraction` together.

    0.5 0.1 0.3 0.1 with a fraction of 0.7 keeps 0.5 and 0.3.
    """
    if fraction == 1:
        return probabilities
    falling = probabilities.sort(dim=-1, descending=True, stable=True)
    before = falling.values.cumsum(dim=-1) - falling.values
    kept = falling.values.masked_fill(before >= fraction, 0.0)
    return torch.zeros_like(kept).scatter(-1, falling.indices, kept)


def uniforms(seed: int, *, streams: list[int], step: int) -> list[float]:
    """A number in [0, 1) for each stream, a pure function of (seed, stream, step).

    A prompt that has a stream of its own draws the same whatever is beside it in its batch. 48 bits
    keep the product with a sum of probabilities below that sum.
    """
    digests = (
        hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=6).digest()
        for stream in streams
    )
    return [int.from_bytes(digest, "big") / 2**48 for digest in digests]
