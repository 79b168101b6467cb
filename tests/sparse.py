"""Small models with experts, one for every way of routing, and a plain loop to compare with."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import silu

from nmm.batch import Modality
from nmm.config import (
    ExpertGroups,
    MoDConfig,
    ModelConfig,
    MoEConfig,
    Norm,
    NormPosition,
    QKNorm,
    Routing,
)
from nmm.model.moe import MoE
from tests.family import EARLY, LATE

GROUPS = ExpertGroups(text=2, image=3)
ROUTINGS: dict[str, MoEConfig] = {
    "token choice": MoEConfig(Routing.token_choice, experts=4),
    "top 2": MoEConfig(
        Routing.token_choice, experts=4, top_k=2, hidden=24, router_z_weight=0.1, group_rows=2
    ),
    "hard": MoEConfig(Routing.modality_hard, groups=ExpertGroups(text=1, image=1)),
    "groups": MoEConfig(Routing.modality_groups, groups=GROUPS, top_k=2),
    "expert choice": MoEConfig(Routing.expert_choice, experts=4),
    "moma": MoEConfig(
        Routing.expert_choice, groups=GROUPS, capacity=1.5, gumbel_noise=True, group_rows=2
    ),
}
SPARSE: dict[str, ModelConfig] = {
    name: replace(EARLY, ffn_hidden=40, moe=moe) for name, moe in ROUTINGS.items()
}
SPARSE["moma"] = replace(
    SPARSE["moma"], norm=Norm.rms, norm_position=NormPosition.swin, qk_norm=QKNorm.head
)
SPARSE["late"] = replace(LATE, moe=ROUTINGS["token choice"])
# Blocks that take some tokens, alone and with experts in them.
DEEP: dict[str, ModelConfig] = {
    "mod": replace(EARLY, mod=MoDConfig(every=2)),
    "mod in swin": replace(
        EARLY, norm_position=NormPosition.swin, mod=MoDConfig(every=1, capacity=0.5, group_rows=2)
    ),
    "mod of moma": replace(SPARSE["moma"], mod=MoDConfig(every=2, capacity=0.5)),
    "mod of top 2": replace(SPARSE["top 2"], mod=MoDConfig(every=2, capacity=0.5, group_rows=2)),
}


def by_loops(layer: MoE, x: Tensor, modality: Tensor, *, config: MoEConfig) -> Tensor:
    """The output of a layer token by token and expert by expert, in float64, without noise."""
    w1, w2, w3 = (w.double() for w in (layer.experts.w1, layer.experts.w2, layer.experts.w3))
    x = x.double()
    out, first = torch.zeros_like(x), 0
    for name, experts in config.sizes.items():
        held = modality != Modality.pad if name == "all" else modality == Modality[name]
        for begin in range(0, len(x), config.group_rows):
            rows = slice(begin, begin + config.group_rows)
            places = [(begin + b, t) for b, t in held[rows].nonzero().tolist()]
            if not places:
                continue
            tokens = torch.stack([x[place] for place in places])
            gates = _gates(layer, tokens, first=first, experts=experts, config=config)
            for place, token, gate in zip(places, tokens, gates, strict=True):
                for e in gate.nonzero().flatten().tolist():
                    hidden = silu(w1[first + e] @ token) * (w3[first + e] @ token)
                    out[place] += gate[e] * (w2[first + e] @ hidden)
        first += experts
    return out


def _gates(layer: MoE, tokens: Tensor, *, first: int, experts: int, config: MoEConfig) -> Tensor:
    """[tokens, experts]: what every expert's output is multiplied by, 0 where it takes nothing."""
    if not config.has_router:
        return torch.ones(len(tokens), 1, dtype=torch.float64)
    weight = layer.router.weight
    assert isinstance(weight, Tensor)
    scores = tokens @ weight[first : first + experts].double().T
    taken = torch.zeros_like(scores)
    if config.chooses_tokens:
        each = int(len(tokens) * config.capacity / experts)
        taken.scatter_(0, scores.topk(each, dim=0).indices, 1.0)
        return scores.sigmoid() * taken
    taken.scatter_(1, scores.topk(config.top_k, dim=1).indices, 1.0)
    return scores.softmax(dim=1) * taken
