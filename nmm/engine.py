"""The DeepSpeed engine behind three verbs: train a step, save, load."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmm.batch import COUNTS, NO_LABEL, Dropped, PackedBatch
from nmm.config import EngineConfig, OptimConfig, OptimName, Precision
from nmm.errors import UserError
from nmm.expert_parallel import divide_experts
from nmm.heartbeat import Phase
from nmm.inside_deepspeed import (
    apart,
    deepspeed,
    gradient_piece,
    leave_update_out,
    let_updates_be_left_out,
    publish,
)
from nmm.model import Group, Model, group, number
from nmm.model.block import Block, Stack
from nmm.parallel import World, add_over_ranks, gather_lists, writing_together
from nmm.pieces import PIECES, Stored, Written, path_of, write_pieces, write_shares
from nmm.routing import Kept, Routed
from nmm.shares import held, shapes, written_by
from nmm.signals import Signals
from nmm.sums import Sum
from nmm.tally import Tally

SECONDS_BETWEEN_LINES = 10.0  # while a checkpoint is read


@dataclass(frozen=True)
class Split:
    """A process's share of a step: `accumulation_steps` micro-batches of `micro_batch` rows."""

    micro_batch: int
    accumulation_steps: int


def split_step(
    global_rows: int, *, micro_batch: int | None, world_size: int, group_rows: int = 1
) -> Split:
    """Divide a step evenly, or refuse; `micro_batch` None takes a process's whole share at once.

    No micro-batch may cut a group of `group_rows` (of model.moe or model.mod).
    """
    if global_rows % world_size:
        raise UserError(
            f"data.global_rows is {global_rows} and there are {world_size} processes; "
            "make the rows a multiple of the processes."
        )
    share = global_rows // world_size
    rows = share if micro_batch is None else micro_batch
    if share % rows:
        raise UserError(
            f"data.global_rows is {global_rows}, engine.micro_batch is {rows} and there are "
            f"{world_size} processes; each process has {share} rows, so choose a micro-batch "
            f"that divides {share}."
        )
    if rows % group_rows:
        raise UserError(
            f"{rows} rows are computed at a time, and model.moe.group_rows or model.mod.group_rows "
            f"is {group_rows}; set engine.micro_batch to a multiple of it, so that no group is cut."
        )
    return Split(micro_batch=rows, accumulation_steps=share // rows)


def deepspeed_config(config: EngineConfig, *, split: Split, clip_norm: float) -> dict[str, Any]:
    """The engine's JSON. Clipping and the overflow check are written out: their defaults moved."""
    return {
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation_steps,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": config.precision is Precision.bf16, "check_grad_overflow": True},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Every trained parameter in exactly one group, the groups in the order of `Group`.

    A frozen encoder is in none, nor is anything beside auxiliary routers: these parameters are told
    to need no gradient.

    Fully decoupled decay multiplies a weight by `1 - weight_decay * lr / lr_peak` (Loshchilov &
    Hutter, "Decoupled Weight Decay Regularization", algorithm 2); torch multiplies by
    `1 - weight_decay * lr`, so torch is given `weight_decay / lr_peak` of the group's own rate.
    """
    members: dict[Group, list[nn.Parameter]] = {each: [] for each in Group}
    for name, parameter in model.named_parameters():
        members[group(name)].append(parameter)
    alone = bool(members[Group.auxiliary])
    trained = [
        each
        for each in members
        if rate_multiplier(each, config) > 0 and (each is Group.auxiliary or not alone)
    ]
    for each, parameters in members.items():
        for parameter in parameters:
            parameter.requires_grad_(each in trained)
    return [
        {
            "params": parameters,
            "name": found.name,
            "lr": config.learning_rate * rate_multiplier(found, config),
            "weight_decay": _torch_decay(found, config),
        }
        for found, parameters in members.items()
        if parameters and found in trained
    ]


def rate_multiplier(group: Group, config: OptimConfig) -> float:
    """The learning rate of a group as a multiple of the schedule's; 0 for a frozen one."""
    return config.vision_rate_multiplier if group.is_vision else 1.0


def _torch_decay(group: Group, config: OptimConfig) -> float:
    if not group.decays:
        return 0.0
    return config.weight_decay / (config.learning_rate * rate_multiplier(group, config))


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer in one kernel over all weights; every group has its own rate and decay."""
    match config.name:
        case OptimName.adamw:
            betas = (config.beta1, config.beta2)
            return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)
        case OptimName.sgd:
            return torch.optim.SGD(groups, fused=True)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, summed over all processes and micro-batches.

    `applied` is False when the loss or the gradient was no number: nothing has changed then, and
    `suspects` are the documents of the micro-batches whose loss was none, or of all if none was.
    """

    tally: Tally
    grad_norm: float
    applied: bool
    dropped: list[Dropped]
    counts: dict[str, int]
    signals: Signals | None
    suspects: list[str]
    routed: Routed | None
    kept: Kept | None


class Engine:
    """A model, its optimizer state and its place among the processes."""

    def __init__(
        self,
        model: Model,
        *,
        config: EngineConfig,
        optim: OptimConfig,
        split: Split,
        num_sources: int,
        world: World,
        seed: int,
    ) -> None:
        self.num_sources, self.world, self._seed = num_sources, world, seed
        self._zero_stage = config.zero_stage
        for stack in (module for module in model.modules() if isinstance(module, Stack)):
            stack.recomputes = config.activation_checkpointing
            if config.compile:
                stack.compile_blocks()
        if config.compile and config.zero_stage == 3:
            # Hooks on the layers inside would break the graph at each of them.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert set(model.state_dict()) <= names, "checkpoints hold parameters, and no buffers"
        if config.expert_parallel > 1:
            divide_experts(model, parts=config.expert_parallel, rank=world.rank)
        groups = apart(parameter_groups(model, optim), parts=config.expert_parallel)
        # By their order, because DeepSpeed does not keep names of ours in every stage.
        of = {parameter: group(name) for name, parameter in model.named_parameters()}
        self._rate_multipliers = [rate_multiplier(of[g["params"][0]], optim) for g in groups]
        optimizer = build_optimizer(groups, optim)
        if config.zero_stage == 0:
            let_updates_be_left_out(optimizer)
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, split=split, clip_norm=optim.clip_norm),
            dist_init_required=False,
        )

    @property
    def model(self) -> nn.Module:
        """The model as the engine runs it; call it on all processes together."""
        return self._engine

    def train_step(
        self,
        batches: Sequence[PackedBatch],
        *,
        learning_rate: float,
        watch: bool = False,
        enter: Callable[[Phase, int], None] = lambda phase, place: None,
    ) -> StepResult:
        """One update from this process's micro-batches; with `watch` the result has signals.

        Losses are summed over tokens and divided by the step's labelled tokens over all processes
        and micro-batches, those of routers by all its tokens. The factor `world.size` undoes
        DeepSpeed's averaging over processes. `enter` is told what is done next, and with which
        micro-batch.
        """
        device = self.world.device
        groups = self._engine.optimizer.param_groups
        for options, multiplier in zip(groups, self._rate_multipliers, strict=True):
            options["lr"] = learning_rate * multiplier
        labels = sum(int((batch.labels != NO_LABEL).sum()) for batch in batches)
        tokens = sum(int((batch.document > 0).sum()) for batch in batches)
        dropped = [document for batch in batches for document in batch.dropped]
        counted = [sum(batch.counts[name] for batch in batches) for name in COUNTS]
        here = [labels, tokens, len(dropped), *counted]
        sums = torch.tensor(here, dtype=torch.int64, device=device)
        step_labels, step_tokens, step_dropped, *counted = add_over_ranks(sums).tolist()
        tally = Tally.zeros(self.num_sources, device=device)
        signals = self._no_signals() if watch else None
        routed = kept = None
        self._engine.train()
        norm, losses = None, []
        for place, batch in enumerate(batches):
            enter(Phase.forward, place)
            self._seed_dropout(place)
            on_device = batch.to(device)
            output = self._engine(on_device, watch=watch)
            loss = output.loss_sum * (self.world.size / max(step_labels, 1))
            loss += output.auxiliary * (self.world.size / max(step_tokens, 1))
            losses.append(loss.detach())
            # A loss that is no number makes a gradient that is none, on every process in the end.
            sound = torch.where(losses[-1].isfinite(), 1.0, torch.nan)
            enter(Phase.backward, place)
            self._engine.backward(loss * sound, scale_wrt_gas=False)
            enter(Phase.optimizer, place)
            if self._zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
                norm = _gradient_norm(self._engine.module)  # stage 0 does not report it
            if signals:
                signals.add(layer_squares=output.layer_squares, log_partition=output.log_partition)
            if signals and self._engine.is_gradient_accumulation_boundary():
                self._add_gradient(signals)
            if norm is not None:
                leave_update_out(self._engine, bad=not math.isfinite(norm))
            self._engine.step()
            if len(output.routed):
                routed = routed or Routed.zeros(shape=output.routed.shape, device=device)
                routed.add(output.routed)
            if len(output.kept):
                kept = kept or Kept.zeros(shape=output.kept.shape, device=device)
                kept.add(output.kept)
            tally.add(on_device, token_losses=output.token_losses, positions=output.positions)
        add_over_ranks(tally.tables)
        if signals:
            add_over_ranks(signals.sums)
        if routed:
            add_over_ranks(routed.tables)
        if kept:
            add_over_ranks(kept.tables)
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        applied = self._engine.was_step_applied()
        return StepResult(
            tally=Tally(tally.tables.cpu()),  # once, not at each number that is read off it
            grad_norm=float(norm),
            applied=applied,
            dropped=gather_lists(dropped) if step_dropped else [],
            counts=dict(zip(COUNTS, counted, strict=True)),
            signals=signals,
            suspects=[] if applied else _suspects(batches, losses),
            routed=routed,
            kept=kept,
        )

    def _seed_dropout(self, place: int) -> None:
        """Dropped numbers follow from the seed, the step, the process and the micro-batch.

        So a resumed run draws what an undisturbed one does. torch's dropout takes no generator.
        """
        where = f"dropout/{self._engine.global_steps}/{self.world.rank}/{place}"
        torch.manual_seed(number(where, seed=self._seed))

    def _no_signals(self) -> Signals:
        return Signals.zeros(self._engine.module.config, device=self.world.device)

    def _add_gradient(self, signals: Signals) -> None:
        """This process's pieces of the gradient, between the way back and the update."""
        for name, parameter in self._engine.module.named_parameters():
            found = gradient_piece(parameter, zero_stage=self._zero_stage, world=self.world)
            if found is not None:
                piece, start = found
                signals.add_gradient(name, piece, start=start)

    def save(self, checkpoint: Path) -> dict[str, Sum]:
        """Write weights and optimizer state into a folder that is there, every process its part.

        Every process gets the sums of all files; raises Unwritten, on all processes together.
        """
        mine, sums = held(self._engine, world=self.world), {}
        shares = [each.share() for each in mine if each.writes]
        with writing_together():
            name = path_of(checkpoint, self.world.rank).name
            sums[name] = write_shares(checkpoint, shares, process=self.world.rank)
        files = gather_lists([[share.pieces for share in shares]])
        updates, kinds = written_by(mine)
        about = Written(
            step=self._engine.global_steps,
            updates=updates,
            kinds=kinds,
            processes=self.world.size,
            zero_stage=self._zero_stage,
            shapes=shapes(self._engine, world=self.world),
            files=files,
        )
        with writing_together():
            if self.world.is_main:
                sums[PIECES] = write_pieces(checkpoint, about)
        return dict(gather_lists(list(sums.items())))

    def bytes_to_save(self) -> int:
        """What all processes together write of weights and state; all call it together."""
        shares = [each.share() for each in held(self._engine, world=self.world) if each.writes]
        mine = sum(tensor.nbytes for share in shares for tensor in share.tensors.values())
        return sum(gather_lists([mine]))

    def load(self, checkpoint: Path, *, say: Callable[[str], None] = print) -> Written:
        """Take what `save` wrote, with any number of processes and in any ZeRO stage."""
        stored = Stored(checkpoint)
        said_at, done = time.monotonic(), 0
        for each in held(self._engine, world=self.world):
            for num_bytes in each.fill(stored):
                done += num_bytes
                if time.monotonic() - said_at > SECONDS_BETWEEN_LINES:
                    said_at = time.monotonic()
                    say(f"read {done / 2**30:.1f} GiB for process {self.world.rank}")
        publish(self._engine, steps=stored.about.step)
        return stored.about


def _gradient_norm(model: nn.Module) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(grads))


def _suspects(batches: Sequence[PackedBatch], losses: Sequence[Tensor]) -> list[str]:
    """The documents of the micro-batches whose loss is no number; of all if none is, anywhere."""
    found = gather_lists(
        [
            (bool(loss.isfinite()), batch.flat_keys)
            for batch, loss in zip(batches, losses, strict=True)
        ]
    )
    blamed = [keys for sound, keys in found if not sound] or [keys for _, keys in found]
    return [key for keys in blamed for key in keys]
