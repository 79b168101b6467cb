"""What a process holds of the weights and of the optimizer's state, in every ZeRO stage.

Stage 0: every parameter, on every process. Stages 1 and 2: one stretch of each group of the
optimizer, whose parameters are laid end to end, in fp32. Stage 3: an equal part of each parameter,
in fp32. Frozen parameters are in no group: whole until stage 2, in parts in stage 3.

NOTE: the attributes are those in which DeepSpeed keeps all this, and releases change them;
nmm/engine.py insists on one version.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nmm.parallel import World
from nmm.pieces import WEIGHT, Piece, Share, Stored

UPDATES = "step"  # torch's name for an optimizer's count of them


@dataclass(frozen=True)
class Place:
    """Where the parameter that a process knows lies in the whole one: from element `first` on.

    `replica` numbers the processes that know the same part; the one with 0 writes it.
    """

    first: int
    shape: tuple[int, ...]
    replica: int


def place_of(parameter: Any, *, world: World) -> Place:
    """Every process knows the whole of every parameter; what differs from that is said here."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 empties the parameter itself
    return Place(first=0, shape=tuple(shape), replica=world.rank)


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
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    trained = _whole if stage == 0 else _by_group if stage < 3 else _by_parameter
    frozen = [p for p in names if not p.requires_grad]
    return [*trained(engine.optimizer, names, world), *_frozen(frozen, names, world)]


Names = dict[Any, str]


def _whole(optimizer: Any, names: Names, world: World) -> Iterator[Held]:
    """Stage 0: torch's own optimizer, and every process has everything."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            place = place_of(parameter, world=world)
            piece = Piece(names[parameter], place.first, 0, parameter.numel())
            state = optimizer.state[parameter]
            yield Held(parameter.detach(), state, [piece], writes=place.replica == 0)


def _by_group(zero: Any, names: Names, world: World) -> Iterator[Held]:
    """Stages 1 and 2: a stretch of a group may begin and end in the middle of a parameter."""
    for parameters, flat in zip(
        zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
    ):
        pieces = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # else it lies in other processes' stretches
                inside, flat_place = mapping.lp_fragment_address, mapping.hp_fragment_address
                first = place_of(parameter, world=world).first
                name, start = names[parameter], first + inside.start
                pieces.append(Piece(name, start, flat_place.start, inside.numel))
        yield Held(flat.detach(), zero.optimizer.state[flat], pieces)


def _by_parameter(zero: Any, names: Names, world: World) -> Iterator[Held]:
    """Stage 3: the parts of a parameter have one length; the last ones may reach beyond its end."""
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        pieces, offset = [], 0
        for parameter in parameters:
            pieces += _part(parameter, names, world, offset=offset)
            offset += parameter.partition_numel()
        yield Held(flat.detach(), zero.optimizer.state[flat], pieces)


def _frozen(parameters: list[Any], names: Names, world: World) -> Iterator[Held]:
    for parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            yield Held(parameter.ds_tensor.detach(), None, _part(parameter, names, world))
        else:
            place = place_of(parameter, world=world)
            piece = Piece(names[parameter], place.first, 0, parameter.numel())
            yield Held(parameter.detach(), None, [piece], writes=place.replica == 0)


def _part(parameter: Any, names: Names, world: World, *, offset: int = 0) -> list[Piece]:
    """This process's part of a parameter that stage 3 has divided: one piece, or none."""
    length = parameter.partition_numel()
    start = dist.get_rank(parameter.ds_process_group) * length
    numel = min(length, parameter.ds_numel - start)
    first = place_of(parameter, world=world).first
    return [Piece(names[parameter], first + start, offset, numel)] if numel > 0 else []


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
    named = engine.module.named_parameters()
    return {name: list(place_of(parameter, world=world).shape) for name, parameter in named}
