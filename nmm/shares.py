"""What a process writes of the weights and of the optimizer's state, by name and place.

Where experts are divided over processes, a process knows a part of such a parameter; all processes
that have the same experts share that part like other parameters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmm.inside_deepspeed import Flat, flats, shape_of
from nmm.model.experts import Experts
from nmm.parallel import World
from nmm.pieces import WEIGHT, Piece, Share, Stored

UPDATES = "step"  # torch's name for an optimizer's count of them


@dataclass(frozen=True)
class Place:
    """Where the parameter that a process knows lies in the whole one, and what that is called.

    `runs` are (first element, elements) of the whole one, which lie end to end in the known one.
    `replica` numbers the processes that know the same part; the one with 0 writes it.
    """

    name: str
    shape: tuple[int, ...]
    runs: list[tuple[int, int]]
    replica: int

    def pieces(self, *, start: int, offset: int, numel: int) -> list[Piece]:
        """Of the known one `numel` elements from `start` on, which are at `offset` in a tensor."""
        found, begin = [], 0
        for first, length in self.runs:
            low, high = max(start, begin), min(start + numel, begin + length)
            if low < high:
                found.append(
                    Piece(self.name, first + low - begin, offset + low - start, high - low)
                )
            begin += length
        return found


Places = dict[Any, Place]


def places(model: nn.Module, *, world: World) -> Places:
    """Every process knows the whole of every parameter, except for experts that are divided."""
    experts = {
        parameter: module
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters(recurse=False)
    }
    return {
        parameter: _place(parameter, name, experts.get(parameter), world=world)
        for name, parameter in model.named_parameters()
    }


def _place(parameter: Any, name: str, experts: Experts | None, *, world: World) -> Place:
    shape = shape_of(parameter)
    if experts is None:
        return Place(name, shape, [(0, math.prod(shape))], replica=world.rank)
    each = math.prod(shape[1:])
    runs = [(number * each, each) for number in experts.numbers]
    parts = experts.total // len(experts.numbers)
    return Place(name, (experts.total, *shape[1:]), runs, replica=world.rank // parts)


@dataclass(frozen=True)
class Held:
    """A tensor of weights, the optimizer's `state` for it (None: frozen), and what lies in it.

    Where several processes have the same numbers, one of them `writes` them.
    """

    weight: Tensor
    state: dict[str, Any] | None
    pieces: list[Piece]
    writes: bool = True

    def share(self) -> Share:
        """What goes into the file: the weights and all that the optimizer keeps like them."""
        state = self.state or {}
        kinds = [k for k, value in state.items() if k != UPDATES and isinstance(value, Tensor)]
        return Share({kind: self._flat(kind) for kind in (WEIGHT, *kinds)}, self.pieces)

    def fill(self, stored: Stored) -> Iterator[int]:
        """Take the numbers of a checkpoint, whoever wrote them; yields the bytes, bit by bit."""
        kinds = [] if self.state is None else stored.about.kinds
        for kind in (WEIGHT, *kinds):
            flat = self._flat(kind) if kind == WEIGHT else self._new(kind, stored.about.updates)
            for piece in self.pieces:
                into = flat.narrow(0, piece.offset, piece.numel)
                stored.copy(into, name=piece.name, kind=kind, start=piece.start)
                yield into.nbytes

    def _new(self, kind: str, updates: int) -> Tensor:
        """State as the optimizer itself would make it, after so many updates."""
        assert self.state is not None
        self.state[kind] = torch.zeros_like(self.weight)
        # NOTE: every state has a tensor of its own, because torch adds 1 to it in place.
        self.state[UPDATES] = torch.tensor(float(updates), device=self.weight.device)
        return self._flat(kind)

    def _flat(self, kind: str) -> Tensor:
        if kind == WEIGHT:
            return self.weight.view(-1)
        assert self.state is not None
        return self.state[kind].view(-1)


def held(engine: Any, *, world: World) -> list[Held]:
    """All that this process holds of a DeepSpeed engine."""
    known = places(engine.module, world=world)
    return [_held(flat, known) for flat in flats(engine)]


def _held(flat: Flat, known: Places) -> Held:
    pieces = [
        piece
        for each in flat.stretches
        for piece in known[each.parameter].pieces(
            start=each.start, offset=each.offset, numel=each.numel
        )
    ]
    writes = not flat.whole or known[flat.stretches[0].parameter].replica == 0
    return Held(flat.weight, flat.state, pieces, writes=writes)


def written_by(held: list[Held]) -> tuple[int, list[str]]:
    """The updates that the optimizer has made, and the kinds of numbers that it keeps."""
    states = [each.state for each in held if each.state]
    updates = {int(state.get(UPDATES, 0)) for state in states}
    kinds = {tuple(k for k in each.share().tensors if k != WEIGHT) for each in held if each.state}
    assert len(updates) <= 1, updates
    assert len(kinds) <= 1, kinds
    return max(updates, default=0), list(max(kinds, default=()))


def shapes(engine: Any, *, world: World) -> dict[str, list[int]]:
    """The shape of every whole parameter by its name."""
    known = places(engine.module, world=world)
    return {place.name: list(place.shape) for place in known.values()}
