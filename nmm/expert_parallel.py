"""Experts divided over processes: applied to a plain model from outside, and told to DeepSpeed.

NOTE: DeepSpeed takes a model to have experts when it finds an AutoEPMoELayer, and knows experts by
attributes of their parameters and of their optimizer groups. All of this is named in this file
only; nmm/engine.py insists on one version.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from nmm.errors import UserError
from nmm.exchange import move, route_to_experts
from nmm.model import Model
from nmm.model.experts import Experts
from nmm.model.moe import MoE


def numbers_of(sizes: Iterable[int], *, part: int, parts: int) -> list[int]:
    """The experts of one of `parts` processes: the same share of every group of so many experts.

    Groups of 4 and 2 on two processes are 0 1 4 and 2 3 5. So no process has the experts of one
    modality only, which other modalities would wait for.
    """
    ends = list(accumulate(sizes))
    numbers = []
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        share = (last - first) // parts
        numbers += range(first + part * share, first + (part + 1) * share)
    return numbers


def refuse_uneven(expert_parallel: int, *, world_size: int) -> None:
    """Every process must be in a group of as many as share the experts."""
    if world_size % expert_parallel:
        raise UserError(
            f"engine.expert_parallel is {expert_parallel} and there are {world_size} processes, "
            f"which are no multiple of it; set engine.expert_parallel=1, or start other processes."
        )


def divide_experts(model: Model, *, parts: int, rank: int) -> None:
    """Leave only the experts of this process in the model; neighbours by rank have the others."""
    sizes = list(model.config.moe.sizes.values())
    numbers = [numbers_of(sizes, part=part, parts=parts) for part in range(parts)]
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.experts.keep(numbers[rank % parts])
            layer.elsewhere = Elsewhere(numbers)
            for parameter in layer.experts.parameters():
                _mark(parameter, parts=parts)


def _mark(parameter: Any, *, parts: int) -> None:
    """What DeepSpeed wants to find on the parameters of experts."""
    parameter.allreduce = False
    parameter.group_name = parameter.ds_zero_partition_group_name = _name(parts)
    parameter.ds_zero_placement_family = "autoep_expert"


def _name(parts: int) -> str:
    """DeepSpeed's, of the group of processes that share experts, and of what is trained in it."""
    return f"ep_size_{parts}"


def apart(groups: list[dict[str, Any]], *, parts: int) -> list[dict[str, Any]]:
    """Optimizer groups with the experts in groups of their own, which DeepSpeed wants to know."""
    found = []
    for group in groups:
        experts = [p for p in group["params"] if getattr(p, "group_name", None) == _name(parts)]
        others = [p for p in group["params"] if getattr(p, "group_name", None) != _name(parts)]
        if others:
            found.append({**group, "params": others})
        if experts:
            found.append({**group, "params": experts, "name": _name(parts), "moe": True})
    return found


class Elsewhere(AutoEPMoELayer):
    """Slots go to their experts on other processes and come back; without parameters.

    (experts, x [S, D], ends [E]) -> [S, D]; `numbers` are the experts of every process. DeepSpeed
    binds `ep_group`, the processes that share the experts.
    """

    def __init__(self, numbers: list[list[int]]) -> None:
        nn.Module.__init__(self)  # the parent's constructor wants a layer of transformers
        self.num_experts, self.ep_size = sum(map(len, numbers)), len(numbers)
        self.ep_group_name = _name(len(numbers))
        self.ep_group: dist.ProcessGroup | None = None
        order = torch.tensor([number for of_one in numbers for number in of_one])
        self.register_buffer("order_E", order, persistent=False)

    def forward(self, experts: Experts, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        group = self.ep_group
        assert group is not None
        assert isinstance(self.order_E, Tensor)
        route, ends_H = route_to_experts(ends_E, order_E=self.order_E, group=group)
        out_RD = experts(move(x_SD, route, group=group), ends_H)
        return move(out_RD, route.back(), group=group)
