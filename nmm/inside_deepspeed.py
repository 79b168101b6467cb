"""DeepSpeed at one exact version, and all names of its inside that this project depends on.

NOTE: releases change these names without a word, so that another version is refused.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nmm.parallel import World

# Before deepspeed is imported: without a GPU it warns on every start that it found none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

DEEPSPEED_VERSION = "0.19.8"
if deepspeed.__version__ != DEEPSPEED_VERSION:
    raise ImportError(
        f"deepspeed is {deepspeed.__version__} but this project is proved with "
        f"{DEEPSPEED_VERSION} only; install that, for example with `make env`."
    )

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# ZeRO-3 calls a collective that torch renamed; nothing a user of this project can change.
warnings.filterwarnings(
    "ignore", message=".*(reduce_scatter|all_gather_into)_tensor.*", category=FutureWarning
)
# An inference collective; the first start on a CPU would compile it for a quarter of a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class Stretch:
    """`numel` elements of a flat parameter from `start` on, which lie at `offset` in a tensor."""

    parameter: Any
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """A tensor of weights, the optimizer's `state` for it (None: frozen), and what lies in it.

    `whole` is one parameter as it is, on every process that knows it.
    """

    weight: Tensor
    state: dict[str, Any] | None
    stretches: list[Stretch]
    whole: bool = False


def flats(engine: Any) -> Iterator[Flat]:
    """All that this process holds of weights, as they are trained, and what is frozen.

    Stage 0: every parameter, on every process. Stages 1 and 2: one stretch of each group of the
    optimizer, whose parameters are laid end to end, in fp32. Stage 3: an equal part of each
    parameter, in fp32. Frozen parameters are in no group: whole until stage 2, in parts in stage 3.
    """
    stage = engine.zero_optimization_stage()
    trained = _whole if stage == 0 else _by_group if stage < 3 else _by_parameter
    yield from trained(engine.optimizer)
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            yield _frozen(parameter)


def _whole(optimizer: Any) -> Iterator[Flat]:
    """Stage 0: torch's own optimizer, and every process has everything."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield _all_of(parameter, optimizer.state[parameter])


def _all_of(parameter: Any, state: dict[str, Any] | None) -> Flat:
    stretch = Stretch(parameter, start=0, offset=0, numel=parameter.numel())
    return Flat(parameter.detach(), state, [stretch], whole=True)


def _by_group(zero: Any) -> Iterator[Flat]:
    """Stages 1 and 2: a stretch of a group may begin and end in the middle of a parameter."""
    for parameters, flat in zip(
        zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
    ):
        stretches = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # else it lies in other processes' stretches
                inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                stretches.append(Stretch(parameter, inside.start, place.start, inside.numel))
        yield Flat(flat.detach(), zero.optimizer.state[flat], stretches)


def _by_parameter(zero: Any) -> Iterator[Flat]:
    """Stage 3: the parts of a parameter have one length; the last ones may reach beyond its end."""
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        stretches, offset = [], 0
        for parameter in parameters:
            stretches.append(_part(parameter, offset=offset))
            offset += parameter.partition_numel()
        yield Flat(flat.detach(), zero.optimizer.state[flat], stretches)


def _frozen(parameter: Any) -> Flat:
    if not hasattr(parameter, "ds_tensor"):
        return _all_of(parameter, None)
    return Flat(parameter.ds_tensor.detach(), None, [_part(parameter, offset=0)])


def _part(parameter: Any, *, offset: int) -> Stretch:
    """This process's part of a parameter that stage 3 has divided."""
    length = parameter.partition_numel()
    start = dist.get_rank(parameter.ds_process_group) * length
    numel = max(0, min(length, parameter.ds_numel - start))
    return Stretch(parameter, start, offset, numel)


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, which stage 3 empties."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def publish(engine: Any, *, steps: int) -> None:
    """Go on after so many steps with the weights that are held in fp32; all processes together."""
    engine.global_steps = steps
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    if stage == 3:
        zero.checkpoint_event_prologue()  # empties what is kept whole, which is no longer right
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()


def gradient_piece(parameter: Any, *, zero_stage: int, world: World) -> tuple[Tensor, int] | None:
    """The part of a parameter's gradient that this process and no other answers for, if any; and
    the element of the parameter that it begins at.

    Stage 0 has the whole gradient everywhere; the main process answers for it. The later stages
    have it in pieces, already summed over processes. DeepSpeed's public call would put the pieces
    of every parameter together on every process.
    """
    if zero_stage == 0:
        return (parameter.grad, 0) if world.is_main and parameter.grad is not None else None
    if zero_stage == 3:
        piece = deepspeed.utils.safe_get_local_grad(parameter)
        if piece is None:
            return None
        part = _part(parameter, offset=0)
        return piece.flatten()[: part.numel], part.start
    place = getattr(parameter, "_hp_mapping", None)
    if place is None:
        return None
    fragment = place.get_lp_grad_fragment(parameter._index_in_param_group)
    return fragment, place.lp_fragment_address.start


def let_updates_be_left_out(optimizer: torch.optim.Optimizer) -> None:
    """For stage 0; the other stages leave an update with a bad gradient out by themselves."""
    optimizer.register_step_pre_hook(_forget_bad_gradients)


def leave_update_out(engine: Any, *, bad: bool) -> None:
    """`overflow` is what DeepSpeed reads to count such a step."""
    engine.optimizer.overflow = bad


def _forget_bad_gradients(optimizer: Any, *_: object) -> None:
    """Without gradients an optimizer changes neither weights nor state."""
    if optimizer.overflow:
        optimizer.zero_grad()


class SharedLayer(AutoEPMoELayer):
    """A layer by which DeepSpeed knows that a model has experts, `parts` processes to share them.

    DeepSpeed binds `ep_group`, the processes that share them.
    """

    def __init__(self, experts: int, *, parts: int) -> None:
        nn.Module.__init__(self)  # the parent's constructor wants a layer of transformers
        self.num_experts, self.ep_size = experts, parts
        self.ep_group_name = _name(parts)
        self.ep_group: dist.ProcessGroup | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        assert self.ep_group is not None, "deepspeed.initialize binds it"
        return self.ep_group


def mark_expert(parameter: Any, *, parts: int) -> None:
    """What DeepSpeed wants to find on the parameters of experts that are divided."""
    parameter.allreduce = False
    parameter.group_name = parameter.ds_zero_partition_group_name = _name(parts)
    parameter.ds_zero_placement_family = "autoep_expert"


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


def _name(parts: int) -> str:
    """DeepSpeed's, of the group of processes that share experts, and of what is trained in it."""
    return f"ep_size_{parts}"
