"""Experts divided over processes: applied to a plain model from outside, and told to DeepSpeed."""

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from nmm.errors import UserError
from nmm.exchange import move, route_to_experts
from nmm.inside_deepspeed import SharedLayer, mark_expert
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
                mark_expert(parameter, parts=parts)


class Elsewhere(SharedLayer):
    """Slots go to their experts on other processes and come back; without parameters.

    (experts, x [S, D], ends [E]) -> [S, D]; `numbers` are the experts of every process.
    """

    def __init__(self, numbers: list[list[int]]) -> None:
        super().__init__(sum(map(len, numbers)), parts=len(numbers))
        order = torch.tensor([number for of_one in numbers for number in of_one])
        self.register_buffer("order_E", order, persistent=False)

    def forward(self, experts: Experts, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        assert isinstance(self.order_E, Tensor)
        route, ends_H = route_to_experts(ends_E, order_E=self.order_E, group=self.group)
        out_RD = experts(move(x_SD, route, group=self.group), ends_H)
        return move(out_RD, route.back(), group=self.group)
