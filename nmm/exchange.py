"""Slots on their way to experts on other processes, and their outputs on the way back.

Legend of shape suffixes: S slots of this process, R slots that it receives, D width, E experts of a
layer, P processes that share them, H experts of each, J blocks of rows.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx


class Route(NamedTuple):
    """How rows go from process to process: sorted, sent, and sorted again.

    leaving   int64[S], the rows in the order in which they are sent
    sent      rows to every process
    received  rows from every process
    arriving  int64[R], what is received in the order in which it is wanted
    """

    leaving: Tensor
    sent: list[int]
    received: list[int]
    arriving: Tensor

    def back(self) -> "Route":
        """The way of every row to where it came from."""
        return Route(_inverse(self.arriving), self.received, self.sent, _inverse(self.leaving))


def route_to_experts(
    ends_E: Tensor, *, order_E: Tensor, group: dist.ProcessGroup
) -> tuple[Route, Tensor]:
    """Slots that are sorted by expert to the experts' processes; they arrive sorted by expert.

    `ends_E` are those of nmm/model/dispatch.py, `order_E` the experts process by process; returned
    are also int32[H], the ends of the experts of this process. The numbers of rows cross first;
    reading them is the one time that a process waits for its GPU.

    Experts 0 and 2 are on process 0, experts 1 and 3 on process 1; ends are 2 5 6 6 on process 0
    and 1 1 3 4 on process 1, whose slots are written with a dash:

        order 0 2 1 3      sent by 0: 2 1 3 0     received by 0: 2 1, 1 2    ends 3 6
        slots  by expert   0 0 1 1 1 2            0' 2' 2' 3'
        process 0 receives 0 0 2, 0' 2' 2'        and sorts them to 0 0 0' 2 2' 2'
        process 1 receives 1 1 1, 3'
    """
    processes = group.size()
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    sent_PH = counts_E[order_E].view(processes, -1)
    received_PH = torch.empty_like(sent_PH)
    dist.all_to_all_single(received_PH, sent_PH, group=group)
    sent, received = torch.stack([sent_PH.sum(dim=1), received_PH.sum(dim=1)]).tolist()
    blocks_PH = torch.arange(received_PH.numel(), device=ends_E.device).view_as(received_PH)
    route = Route(
        leaving=rows_of_blocks(counts_E, order_J=order_E, rows=sum(sent)),
        sent=sent,
        received=received,
        arriving=rows_of_blocks(
            received_PH.flatten(), order_J=blocks_PH.t().flatten(), rows=sum(received)
        ),
    )
    return route, received_PH.sum(dim=0).cumsum(0).int()


def rows_of_blocks(sizes_J: Tensor, *, order_J: Tensor, rows: int) -> Tensor:
    """int64[rows]: the rows of blocks that lie one after the other, when the blocks change places.

    Sizes 2 1 2 and the order 2 0 1 are the rows 3 4 0 1 2.
    """
    starts_J, sizes_in_order_J = (sizes_J.cumsum(0) - sizes_J)[order_J], sizes_J[order_J]
    ends_J = sizes_in_order_J.cumsum(0)
    row = torch.arange(rows, device=sizes_J.device)
    block = torch.searchsorted(ends_J, row, right=True)
    return row + (starts_J + sizes_in_order_J - ends_J)[block]


def move(x_SD: Tensor, route: Route, *, group: dist.ProcessGroup) -> Tensor:
    """[R, D]: the rows at the end of their way; gradients go all the way back."""
    result = _Move.apply(x_SD, route, group)
    assert isinstance(result, Tensor)
    return result


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_SD: Tensor, route: Route, group: dist.ProcessGroup) -> Tensor:
        ctx.way = route, group  # pyright: ignore[reportAttributeAccessIssue]
        return _moved(x_SD, route, group=group)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        route, group = ctx.way  # pyright: ignore[reportAttributeAccessIssue]
        return _moved(grad_outputs[0], route.back(), group=group), None, None


def _moved(x_SD: Tensor, route: Route, *, group: dist.ProcessGroup) -> Tensor:
    arrived_RD = x_SD.new_empty(sum(route.received), x_SD.shape[1])
    leaving_SD = x_SD.index_select(0, route.leaving)
    dist.all_to_all_single(
        arrived_RD,
        leaving_SD,
        output_split_sizes=route.received,
        input_split_sizes=route.sent,
        group=group,
    )
    return arrived_RD.index_select(0, route.arriving)


def _inverse(order: Tensor) -> Tensor:
    """Of a permutation."""
    number = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, number)
