"""Beginning from another run's checkpoint: a branch, its weights alone, experts, other routers.

A branch trains on its parent's next batches, with the parent's optimizer state, under a schedule of
its own; its steps and counts go on from the parent's. An upcycled run trains on the next batches
too and its counts go on, while its steps and all else begin anew (nmm/upcycle.py). Auxiliary
routers learn of weights that stay as they are, in steps of their own, from the data's beginning.
"""

from pathlib import Path
from typing import Any

import torch

from nmm.checkpoint import Progress, complete, read_progress, step_of
from nmm.config import ModelConfig, ParentConfig, ParentMode, read_yaml
from nmm.errors import UserError
from nmm.identity import CODEBOOK, HELD_OUT, TOKENIZER, refuse_contradiction
from nmm.intact import damage_of
from nmm.model import Group, Model, group
from nmm.parallel import World, copy_from_main
from nmm.pieces import Stored
from nmm.rundir import CONFIG, MANIFEST
from nmm.upcycle import Upcycled, seeds

# What a branch may have otherwise: where its parent came from, and what it is evaluated on.
FREE = ("parent.", "evaluation.", HELD_OUT)
# What weights do not depend on. The rest of model.* says what they mean.
FREE_OF_WEIGHTS = ("model.dropout", "model.vision.dropout", "model.z_loss")
# What upcycling changes; nmm/upcycle.py compares the sizes.
OF_EXPERTS = ("model.moe.", "model.ffn_hidden")
OF_AUXILIARY_ROUTERS = (
    "model.moe.auxiliary_routers",
    "model.moe.gumbel_noise",
    "model.mod.auxiliary_router",
)
REMEDY = "give the value of the parent, or another parent.run"
GIVE_ANOTHER = "give another parent.step"


def checkpoint_of(config: ParentConfig) -> Path:
    """The parent's complete checkpoint that the config names; raises UserError for none."""
    assert config.run is not None, "the run has no parent"
    parent = Path(config.run).absolute()
    if not (parent / MANIFEST).exists():
        raise UserError(
            f"parent.run is {config.run}, which is no run (it has no {MANIFEST}); give the "
            f"directory of a run, for example runs/trunk."
        )
    found = {step_of(path): path for path in complete(parent)}
    if config.step not in found:
        have = f"of the steps {', '.join(map(str, found))}" if found else "of no step"
        raise UserError(
            f"parent.step is {config.step} but {parent} has complete checkpoints {have}; give one "
            f"of them, or train the parent with checkpoint.keep_steps=[{config.step}]."
        )
    return found[config.step]


def begun_from(
    checkpoint: Path,
    *,
    mode: ParentMode,
    identity: dict[str, Any],
    total_steps: int,
    model: ModelConfig,
) -> Progress:
    """Where a run with this parent stands before its first step; raises UserError if it cannot."""
    progress = read_progress(checkpoint)
    parent = {
        "run": str(checkpoint.parents[1]),
        "step": progress.step,
        "mode": mode.name,
        **{key: progress.totals.get(key, 0) for key in ("tokens", "flops")},
    }
    saved, current = (
        {key: value for key, value in values.items() if _must_agree(key, mode)}
        for values in (progress.identity, identity)
    )
    refuse_contradiction(saved, current, checkpoint=checkpoint, remedy=REMEDY)
    if mode in (ParentMode.weights, ParentMode.auxiliary_routers):
        return Progress(identity=identity, parent=parent)
    if mode is ParentMode.upcycle:
        seeds(_model_of(checkpoint), config=model)
        return Progress(
            stream=progress.stream,
            totals=progress.totals,
            bad_documents=progress.bad_documents,
            identity=identity,
            parent=parent,
        )
    if progress.step >= total_steps:
        raise UserError(
            f"schedule.total_steps is {total_steps} and parent.step is {progress.step}; a branch "
            f"counts its steps from its parent's beginning, so make it longer."
        )
    progress.first_step, progress.logged_step = progress.step, 0
    progress.identity, progress.parent = identity, parent
    return progress


def load_weights(model: Model, checkpoint: Path, *, mode: ParentMode, world: World) -> None:
    """Copy a checkpoint's weights over the initial ones; the main process reads for all."""
    with torch.no_grad(), damage_of(checkpoint, remedy=GIVE_ANOTHER):
        first = _first_weights(model, checkpoint, mode=mode) if world.is_main else None
        for name, parameter in model.named_parameters():
            is_new = mode is ParentMode.auxiliary_routers and group(name) is Group.auxiliary
            if first and not is_new:
                first.fill(parameter, name=name)
            copy_from_main(parameter, world=world)


def _first_weights(model: Model, checkpoint: Path, *, mode: ParentMode) -> Stored | Upcycled:
    stored = Stored(checkpoint)
    if mode is not ParentMode.upcycle:
        return stored
    seed = _model_of(checkpoint)
    return Upcycled(stored, seed, seeds(seed, config=model.config))


def _model_of(checkpoint: Path) -> ModelConfig:
    """The model that a run's checkpoint is of."""
    return read_yaml(checkpoint.parents[1] / CONFIG).model


def _must_agree(key: str, mode: ParentMode) -> bool:
    """Must this value of the identity be the parent's?"""
    of_weights = key in (TOKENIZER, CODEBOOK) or (
        key.startswith("model.") and key not in FREE_OF_WEIGHTS
    )
    match mode:
        case ParentMode.branch:
            return not key.startswith(FREE)
        case ParentMode.weights:  # the ids of units are places in the weights
            return of_weights or key.startswith("data.units")
        case ParentMode.auxiliary_routers:
            of_ids = key.startswith(("data.units", "data.masking"))
            return of_ids or (of_weights and key not in OF_AUXILIARY_ROUTERS)
        case ParentMode.upcycle:
            of_data = key.startswith("data.") and key != HELD_OUT
            return of_data or (of_weights and not key.startswith(OF_EXPERTS))
