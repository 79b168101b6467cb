"""One table that says how every parameter begins and whether weight decay shrinks it.

The scales are open_lm's: truncated normal with std 1/sqrt(fan_in), cut at three std; projections
that write to the residual stream are divided by sqrt(2 * (layer + 1)).
"""

import hashlib
import math
import re
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn


class Start(Enum):
    """How a parameter is drawn."""

    ones = "ones"
    fan_in = "fan_in"
    fan_in_by_depth = "fan_in_by_depth"


@dataclass(frozen=True)
class Rule:
    """`pattern` matches whole parameter names; its first group is the layer, from 0."""

    pattern: str
    start: Start
    decays: bool


RULES = (
    Rule(r"embedding\.weight", Start.fan_in, decays=True),
    Rule(r"patch\.weight", Start.fan_in, decays=True),
    Rule(r"blocks\.(\d+)\.(?:attention|ffn)_norm\.weight", Start.ones, decays=False),
    Rule(r"blocks\.(\d+)\.attention\.[qk]_norm\.weight", Start.ones, decays=False),
    Rule(r"blocks\.(\d+)\.attention\.qkv\.weight", Start.fan_in, decays=True),
    Rule(r"blocks\.(\d+)\.attention\.out\.weight", Start.fan_in_by_depth, decays=True),
    Rule(r"blocks\.(\d+)\.ffn\.gate_up\.weight", Start.fan_in, decays=True),
    Rule(r"blocks\.(\d+)\.ffn\.down\.weight", Start.fan_in_by_depth, decays=True),
    Rule(r"norm\.weight", Start.ones, decays=False),
    Rule(r"head\.weight", Start.fan_in, decays=True),
)


def rule(name: str) -> Rule:
    """The one rule of a parameter."""
    rules = [r for r in RULES if re.fullmatch(r.pattern, name)]
    assert len(rules) == 1, f"{name} has {len(rules)} rules in nmm/model/init.py"
    return rules[0]


def decays(name: str) -> bool:
    """Does weight decay shrink this parameter? Matrices yes, gains no."""
    return rule(name).decays


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int) -> None:
    """Draw every parameter anew, a pure function of (seed, its name, its shape).

    Each name has its own generator on the CPU: neither the device, nor the global random state, nor
    other parameters matter, so a model that gains a part keeps the initial weights of the others.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(_draw(name, shape=parameter.shape, seed=seed))


def _draw(name: str, *, shape: torch.Size, seed: int) -> Tensor:
    start = rule(name).start
    if start is Start.ones:
        return torch.ones(shape)
    std = std_of(name, fan_in=shape[1])
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    values = torch.empty(shape)
    return nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)


def std_of(name: str, *, fan_in: int) -> float:
    """Standard deviation of a matrix's initial values, before the cut at three of it."""
    found = rule(name)
    std = 1 / math.sqrt(fan_in)
    if found.start is Start.fan_in:
        return std
    match = re.fullmatch(found.pattern, name)
    assert match is not None
    return std / math.sqrt(2 * (int(match[1]) + 1))
