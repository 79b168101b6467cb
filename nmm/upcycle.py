"""Experts that begin as the feed-forward layers of a model that has no choice to make yet.

Every expert of a modality begins as the seed's one layer for it, or for all. Routers are new, all
else is taken as it is ("MoMa", upcycling). The seed is dense or has one expert for each modality.

With swin norms this changes little: where k equal experts take a token with the gates g, the norm
behind them sees (g1 + ... + gk) f(x) in place of f(x), and takes the factor out again. What no
expert takes skips the layer.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from nmm.config import ModelConfig
from nmm.errors import UserError
from nmm.pieces import WEIGHT, Stored

EXPERTS = re.compile(r"(blocks\.\d+\.ffn\.)experts\.(w[123])")
ROUTER = re.compile(r"blocks\.\d+\.ffn\.router\..*")
# In a dense layer, nmm/model/layers.py: the matrix, and where it begins, in sizes of an expert's.
DENSE = {"w1": ("gate_up.weight", 0), "w3": ("gate_up.weight", 1), "w2": ("down.weight", 0)}


def seeds(seed: ModelConfig, *, config: ModelConfig) -> list[int]:
    """For every expert of `config` the number of the seed's expert that it begins as.

    All are 0 where the seed is dense. Raises UserError for a seed that does not fit.
    """
    _check_sizes(seed, config=config)
    known = {name: number for number, name in enumerate(seed.moe.sizes)}
    known = known if seed.sparse else {"all": 0}
    found = []
    for name, count in config.moe.sizes.items():
        number = known.get(name, known.get("all"))
        if number is None:
            served = "all modalities" if name == "all" else name
            raise UserError(
                f"parent.mode is upcycle and the model has experts for {served}, but the parent "
                f"has layers for {' and '.join(known)} only; give the model experts for these "
                f"with model.moe.groups, or another parent.run."
            )
        found += [number] * count
    return found


def _check_sizes(seed: ModelConfig, *, config: ModelConfig) -> None:
    if seed.sparse and max(seed.moe.sizes.values()) > 1:
        raise UserError(
            f"parent.mode is upcycle and the parent has the experts {seed.moe.sizes}, so that it "
            f"is not said which of them an expert begins as; give a dense parent.run, or one with "
            f"one expert for each modality."
        )
    if seed.expert_hidden != config.expert_hidden:
        raise UserError(
            f"parent.mode is upcycle and experts have the inner size {config.expert_hidden}, but "
            f"the parent's feed-forward layers have {seed.expert_hidden}; set "
            f"model.moe.hidden={seed.expert_hidden}."
        )


@dataclass(frozen=True)
class Upcycled:
    """The weights of a seed's checkpoint as the initial ones of a model with these experts."""

    stored: Stored
    seed: ModelConfig
    experts: list[int]

    def fill(self, parameter: Tensor, *, name: str) -> None:
        """Put a parameter's first value in its place; routers keep the one that was drawn."""
        if ROUTER.fullmatch(name):
            return
        found = EXPERTS.fullmatch(name)
        if found is None:
            self.stored.fill(parameter, name=name)
            return
        for expert, number in zip(parameter, self.experts, strict=True):
            place, seed_name = number, name
            if self.seed.sparse is None:
                matrix, place = DENSE[found[2]]
                seed_name = found[1] + matrix
            start = place * expert.numel()
            self.stored.copy(expert.view(-1), name=seed_name, kind=WEIGHT, start=start)
