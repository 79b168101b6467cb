"""One table that says how every parameter begins, and in which group the optimizer has it.

The scales are open_lm's, for the vision encoder as well: truncated normal with std 1/sqrt(fan_in),
cut at three std; projections that write to the residual stream are divided by
sqrt(2 * (layer + 1)). An expert begins like a dense layer, a router with the std 0.02 of the public
trainer of "Scaling Laws for Native Multimodal Models". Gains begin at 1, biases at 0; neither
decays, nor do learned positions.
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
    zeros = "zeros"
    fan_in = "fan_in"
    fan_in_by_depth = "fan_in_by_depth"
    router = "router"


ROUTER_STD = 0.02


class Group(Enum):
    """Parameters of a group have one learning rate and one weight decay.

    Where there are `auxiliary` ones, they alone are trained.
    """

    decay = "decay"
    no_decay = "no_decay"
    vision_decay = "vision_decay"
    vision_no_decay = "vision_no_decay"
    auxiliary = "auxiliary"

    @property
    def is_vision(self) -> bool:
        """Does it have the learning rate of the vision encoder?"""
        return self in (Group.vision_decay, Group.vision_no_decay)

    @property
    def decays(self) -> bool:
        """Does weight decay shrink it?"""
        return self in (Group.decay, Group.vision_decay, Group.auxiliary)


@dataclass(frozen=True)
class Rule:
    """`pattern` matches whole parameter names; its first group is the layer, from 0."""

    pattern: str
    start: Start
    group: Group


def _of_blocks(prefix: str, *, decay: Group, rest: Group) -> tuple[Rule, ...]:
    """The rules of a stack of blocks and of the norm behind it."""
    block = prefix + r"blocks\.(\d+)\."
    return (
        Rule(block + r"(?:attention|ffn)_norm\.weight", Start.ones, rest),
        Rule(block + r"attention\.[qk]_norm\.weight", Start.ones, rest),
        Rule(block + r"attention\.qkv\.weight", Start.fan_in, decay),
        Rule(block + r"attention\.out\.weight", Start.fan_in_by_depth, decay),
        Rule(block + r"ffn\.(?:gate_up|up)\.weight", Start.fan_in, decay),
        Rule(block + r"ffn\.down\.weight", Start.fan_in_by_depth, decay),
        Rule(block + r"(?:ffn\.router|depth_router)\.weight", Start.router, decay),
        Rule(block + r".*router\.auxiliary\..*\.weight", Start.fan_in, Group.auxiliary),
        Rule(block + r"ffn\.experts\.w[13]", Start.fan_in, decay),
        Rule(block + r"ffn\.experts\.w2", Start.fan_in_by_depth, decay),
        Rule(block + r".*\.bias", Start.zeros, rest),
        Rule(prefix + r"norm\.weight", Start.ones, rest),
        Rule(prefix + r"norm\.bias", Start.zeros, rest),
    )


RULES = (
    Rule(r"embedding\.weight", Start.fan_in, Group.decay),
    Rule(r"position\.weight", Start.fan_in, Group.no_decay),
    Rule(r"patch\.weight", Start.fan_in, Group.decay),
    *_of_blocks("", decay=Group.decay, rest=Group.no_decay),
    Rule(r"head\.weight", Start.fan_in, Group.decay),
    Rule(r"vision\.patch\.weight", Start.fan_in, Group.vision_decay),
    Rule(r"vision\.position", Start.fan_in, Group.vision_no_decay),
    *_of_blocks(r"vision\.", decay=Group.vision_decay, rest=Group.vision_no_decay),
    Rule(r"connector\.weight", Start.fan_in, Group.decay),
    Rule(r"connector\.bias", Start.zeros, Group.no_decay),
)


def rule(name: str) -> Rule:
    """The one rule of a parameter."""
    rules = [r for r in RULES if re.fullmatch(r.pattern, name)]
    assert len(rules) == 1, f"{name} has {len(rules)} rules in nmm/model/init.py"
    return rules[0]


def group(name: str) -> Group:
    """The optimizer group of a parameter."""
    return rule(name).group


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
    if start is Start.zeros:
        return torch.zeros(shape)
    std = std_of(name, fan_in=shape[-1])
    generator = torch.Generator().manual_seed(number(name, seed=seed))
    values = torch.empty(shape)
    return nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)


def number(name: str, *, seed: int) -> int:
    """64 bits that look drawn and are a pure function of both."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def std_of(name: str, *, fan_in: int) -> float:
    """Standard deviation of a matrix's initial values, before the cut at three of it."""
    found = rule(name)
    if found.start is Start.router:
        return ROUTER_STD
    std = 1 / math.sqrt(fan_in)
    if found.start is Start.fan_in:
        return std
    match = re.fullmatch(found.pattern, name)
    assert match is not None
    return std / math.sqrt(2 * (int(match[1]) + 1))
