"""What a process holds of the weights and of the optimizer's state, in every ZeRO stage.

Stage 0: every parameter, on every process. Stages 1 and 2: one stretch of each group of the
optimizer, whose parameters are laid end to end, in fp32. Stage 3: an equal part of each parameter,
in fp32. Frozen parameters are in no group: whole until stage 2, in parts in stage 3. Where experts
are divided over processes, all of this is so of those of a process among the processes that have
the same ones.

NOTE: the attributes are those in which DeepSpeed keeps all this, and releases change them;
nmm/engine.py insists on one version.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # stage 3 empties the parameter
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
    stage = engine.zero_optimization_stage()
    trained = _whole if stage == 0 else _by_group if stage < 3 else _by_parameter
    frozen = [parameter for parameter in known if not parameter.requires_grad]
    return [*trained(engine.optimizer, known), *_frozen(frozen, known)]


def _whole(optimizer: Any, known: Places) -> Iterator[Held]:
    """Stage 0: torch's own optimizer, and every process has everything."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            place, state = known[parameter], optimizer.state[parameter]
            pieces = place.pieces(start=0, offset=0, numel=parameter.numel())
            yield Held(parameter.detach(), state, pieces, writes=place.replica == 0)


def _by_group(zero: Any, known: Places) -> Iterator[Held]:
    """Stages 1 and 2: a stretch of a group may begin and end in the middle of a parameter."""
    for parameters, flat in zip(
        zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
    ):
        pieces = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # else it lies in other processes' stretches
                inside, flat_place = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces += known[parameter].pieces(
                    start=inside.start, offset=flat_place.start, numel=inside.numel
                )
        yield Held(flat.detach(), zero.optimizer.state[flat], pieces)


def _by_parameter(zero: Any, known: Places) -> Iterator[Held]:
    """Stage 3: the parts of a parameter have one length; the last ones may reach beyond its end."""
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        pieces, offset = [], 0
        for parameter in parameters:
            pieces += _part(parameter, known, offset=offset)
            offset += parameter.partition_numel()
        yield Held(flat.detach(), zero.optimizer.state[flat], pieces)


def _frozen(parameters: list[Any], known: Places) -> Iterator[Held]:
    for parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            yield Held(parameter.ds_tensor.detach(), None, _part(parameter, known))
        else:
            place = known[parameter]
            pieces = place.pieces(start=0, offset=0, numel=parameter.numel())
            yield Held(parameter.detach(), None, pieces, writes=place.replica == 0)


def _part(parameter: Any, known: Places, *, offset: int = 0) -> list[Piece]:
    """This process's part of a parameter that stage 3 has divided."""
    length = parameter.partition_numel()
    start = dist.get_rank(parameter.ds_process_group) * length
    numel = min(length, parameter.ds_numel - start)
    return known[parameter].pieces(start=start, offset=offset, numel=numel)


def publish(engine: Any) -> None:
    """Compute with the weights that are held in fp32 from now on; all processes together."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    if stage == 3:
        zero.checkpoint_event_prologue()  # empties what is kept whole, which is no longer right
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()


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
