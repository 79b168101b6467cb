"""Checkpoints of a run: written, found again, and refused when they contradict the config.

A marker is written last, and only a checkpoint that has it is found.
checkpoints/step_00001000/state.json    step, place in the data, cumulative counters, identity
                         /pieces.json, /*.pt   weights and optimizer state (nmm/pieces.py)
                         /COMPLETE      empty; its presence says that all the rest is there
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from data.plan import StreamState
from nmm.config import CheckpointConfig, Resume
from nmm.engine import Engine
from nmm.errors import UserError
from nmm.parallel import World, barrier, from_main, is_of_a_collective
from nmm.pieces import Written
from nmm.schedule import at_interval, due

MARKER = "COMPLETE"

# What torch and DeepSpeed raise on files that are cut, missing, or hold something else.
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    AssertionError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    UnpicklingError,
)
FORMAT = 5


@dataclass
class Progress:
    """Everything of a run that is neither weights nor optimizer state.

    The run began at `first_step` (0 unless it is a branch) and stands after `step`. `logged_step`
    is that of the last row of losses.jsonl, `learning_rate` that of the step last taken, `stream`
    the place in the data, `totals` the cumulative keys of losses.jsonl; `bad_documents` counts what
    could not be read of every window that goes on; `identity` holds the values that must be the
    same when the run continues. `parent` is where the run came from: run, step, mode, and the
    tokens and flops that were behind it there.
    """

    step: int = 0
    first_step: int = 0
    logged_step: int = 0
    learning_rate: float = 0.0
    stream: dict[str, Any] | None = None
    totals: dict[str, int] = field(default_factory=dict)
    bad_documents: dict[str, int] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    parent: dict[str, Any] | None = None


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints of a run directory, oldest first."""
    return [path for path in _all(directory) if (path / MARKER).exists()]


def _unfinished(directory: Path) -> list[Path]:
    """What kills left: checkpoints that were being written or removed."""
    return [path for path in _all(directory) if not (path / MARKER).exists()]


def _all(directory: Path) -> list[Path]:
    """Checkpoints by their exact names; what else a user puts beside them is not ours."""
    found = (directory / "checkpoints").glob("step_*")
    return sorted(path for path in found if re.fullmatch(r"step_\d{8}", path.name))


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint; half-written ones are never considered."""
    found = complete(directory)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("step_"))


def read_progress(checkpoint: Path) -> Progress:
    """Read state.json; raises UserError for one that this version did not write."""
    path = checkpoint / "state.json"
    remedy = f"delete {checkpoint}, so that the run continues from the checkpoint before it."
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    if not isinstance(stored, dict) or "format" not in stored:
        raise UserError(f"{path} is damaged (it has no format); {remedy}")
    written = stored.pop("format")
    if written != FORMAT:
        raise UserError(
            f"{checkpoint} has format {written} but this version reads {FORMAT}; continue the run "
            f"with the version that started it (manifest.json names the commit)."
        )
    try:
        progress = Progress(**stored)
        StreamState.from_dict(progress.stream or {})
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
    if not isinstance(progress.step, int) or not isinstance(progress.identity, dict):
        raise UserError(f"{path} is damaged (step or identity); {remedy}")
    return progress


def check_resume(found: Path | None, resume: Resume, *, directory: Path) -> None:
    """Hold the user to run.resume: `must` wants a checkpoint, `never` wants none."""
    if found is None and resume is Resume.must:
        raise UserError(
            f"run.resume is must but {directory} has no complete checkpoint; set run.resume=auto "
            "to start it from the beginning, or correct run.name and run.dir."
        )
    if found is not None and resume is Resume.never:
        raise UserError(
            f"run.resume is never but {directory} has the checkpoint {found.name}; "
            "set run.resume=auto to continue it, or choose another run.name."
        )


def save(
    engine: Engine, progress: Progress, *, directory: Path, config: CheckpointConfig, world: World
) -> None:
    """Write a checkpoint, mark it complete, then remove those not to be kept."""
    tag = f"step_{progress.step:08d}"
    checkpoint = directory / "checkpoints" / tag
    if world.is_main:
        for unfinished in _unfinished(directory):
            _remove(unfinished)
        checkpoint.mkdir(parents=True)
        state = {"format": FORMAT, **vars(progress)}
        (checkpoint / "state.json").write_text(json.dumps(state))
    barrier()
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint} was made by the main process but process {world.rank} does not see it; "
            f"put run.dir on a file system that all machines share."
        )
    engine.save(checkpoint)
    barrier()
    if world.is_main:
        (checkpoint / MARKER).touch()
        for old in complete(directory)[: -config.keep_last]:
            if not is_kept(step_of(old), config):
                _remove(old)


def is_saved(directory: Path, progress: Progress, *, world: World) -> bool:
    """Would the same command continue from where the run stands? Its beginning needs no saving."""
    found = from_main(newest(directory) if world.is_main else None)
    return progress.step == (step_of(found) if found else progress.first_step)


def is_due(step: int, config: CheckpointConfig, *, last: int) -> bool:
    """Is a checkpoint to be made after this step of a run that ends with `last`?"""
    return due(step, every=config.every_steps, last=last) or is_kept(step, config)


def is_kept(step: int, config: CheckpointConfig) -> bool:
    """Is the checkpoint of this step to be kept for good?"""
    return at_interval(step, every=config.keep_every_steps) or step in config.keep_steps


DELETE = "delete it, and the same command continues from the checkpoint before it"


def load(
    engine: Engine, checkpoint: Path, *, say: Callable[[str], None], remedy: str = DELETE
) -> Written:
    """Weights and optimizer state of a complete checkpoint, into the engine."""
    with damage_of(checkpoint, remedy=remedy):
        return engine.load(checkpoint, say=say)


@contextmanager
def damage_of(checkpoint: Path, *, remedy: str = DELETE) -> Iterator[None]:
    """A file that is no part of a checkpoint becomes one sentence."""
    try:
        yield
    except DAMAGE as error:
        if is_of_a_collective(error):
            raise
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{checkpoint} is damaged ({type(error).__name__}: {reason[0] if reason else ''}); "
            f"{remedy}."
        ) from error


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first: a kill in between leaves an ignored one."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
