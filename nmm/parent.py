"""Beginning from another run's checkpoint: a branch of its training, or its weights alone.

A branch trains on its parent's next batches, with the parent's optimizer state, under a schedule of
its own; its steps and counts go on from the parent's.
"""

from pathlib import Path
from typing import Any

import torch

from nmm.checkpoint import (
    Progress,
    complete,
    damage_of,
    read_progress,
    step_of,
)
from nmm.config import ParentConfig, ParentMode
from nmm.errors import UserError
from nmm.identity import CODEBOOK, HELD_OUT, TOKENIZER, refuse_contradiction
from nmm.model import Model
from nmm.parallel import World, copy_from_main
from nmm.pieces import WEIGHT, Stored
from nmm.rundir import MANIFEST

# What a branch may have otherwise: where its parent came from, and what it is evaluated on.
FREE = ("parent.", "evaluation.", HELD_OUT)
# What weights do not depend on. The rest of model.* says what they mean.
FREE_OF_WEIGHTS = ("model.dropout", "model.vision.dropout", "model.z_loss")
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
    checkpoint: Path, *, mode: ParentMode, identity: dict[str, Any], total_steps: int
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
    if mode is ParentMode.weights:
        return Progress(identity=identity, parent=parent)
    if progress.step >= total_steps:
        raise UserError(
            f"schedule.total_steps is {total_steps} and parent.step is {progress.step}; a branch "
            f"counts its steps from its parent's beginning, so make it longer."
        )
    progress.first_step, progress.logged_step = progress.step, 0
    progress.identity, progress.parent = identity, parent
    return progress


def load_weights(model: Model, checkpoint: Path, *, world: World) -> None:
    """Copy a checkpoint's weights over the initial ones; the main process reads for all."""
    with torch.no_grad(), damage_of(checkpoint, remedy=GIVE_ANOTHER):
        stored = Stored(checkpoint) if world.is_main else None
        for name, parameter in model.named_parameters():
            if stored:
                stored.copy(parameter.view(-1), name=name, kind=WEIGHT)
            copy_from_main(parameter, world=world)


def _must_agree(key: str, mode: ParentMode) -> bool:
    """Must this value of the identity be the parent's?"""
    match mode:
        case ParentMode.branch:
            return not key.startswith(FREE)
        case ParentMode.weights:
            return key in (TOKENIZER, CODEBOOK) or (
                key.startswith("model.") and key not in FREE_OF_WEIGHTS
            )
