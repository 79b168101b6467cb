"""Checkpoints of a run: written, found again, and refused when they contradict the config.

A marker is written last, and only a checkpoint that has it is found.
checkpoints/step_00001000/state.json    step, place in the data, cumulative counters, identity
                         /pieces.json, /*.pt   weights and optimizer state (nmm/pieces.py)
                         /COMPLETE      bytes and CRC-32 of every other file; all are there
Whether the files still are as COMPLETE says is asked by nmm/intact.py.
"""

import json
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmm.config import CheckpointConfig, Resume
from nmm.engine import Engine
from nmm.errors import UserError
from nmm.parallel import Unwritten, World, from_main, writing_together
from nmm.schedule import at_interval, due
from nmm.sums import MARKER, Sum, write_text

STATE = "state.json"
KEPT = "KEEP"  # in a checkpoint whose step does not say that it is kept for good
SPARE_BYTES = 2**20  # for the small files, and for the logs beside

FORMAT = 6


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


def _remove_unfinished(directory: Path) -> None:
    """What kills and full disks left: checkpoints that were being written or removed."""
    for path in _all(directory):
        if not (path / MARKER).exists():
            shutil.rmtree(path)


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
    """Read state.json of an intact checkpoint; raises UserError for one of another version."""
    stored = json.loads((checkpoint / STATE).read_text())
    refuse_format(stored.pop("format"), checkpoint=checkpoint)
    return Progress(**stored)


def refuse_format(written: object, *, checkpoint: Path) -> None:
    if written != FORMAT:
        raise UserError(
            f"{checkpoint} has format {written} but this version reads {FORMAT}; continue the run "
            f"with the version that started it (manifest.json names the commit)."
        )


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
    engine: Engine,
    progress: Progress,
    *,
    directory: Path,
    config: CheckpointConfig,
    world: World,
    keep: bool = False,
    held: Collection[Path] = (),
) -> Path:
    """Write a checkpoint, mark it complete, then remove those not to be kept.

    With `keep` it is kept for good, whatever its step; those that are `held` stay this time.

    Where it cannot be written, nothing of it is left, and Unwritten is raised on all processes.
    """
    checkpoint = directory / "checkpoints" / f"step_{progress.step:08d}"
    try:
        _write(engine, progress, checkpoint, keep=keep, world=world)
    except Unwritten:
        if world.is_main:
            with suppress(OSError):
                _remove_unfinished(directory)
        raise
    if world.is_main:
        with suppress(OSError):  # the next one removes what stays
            for old in complete(directory)[: -config.keep_last]:
                kept = is_kept(step_of(old), config) or (old / KEPT).exists()
                if not kept and old not in held:
                    _remove(old)
    return checkpoint


def _write(
    engine: Engine, progress: Progress, checkpoint: Path, *, keep: bool, world: World
) -> None:
    """All files, the marker last."""
    sums: dict[str, Sum] = {}
    num_bytes = engine.bytes_to_save()
    with writing_together():
        if world.is_main:
            make_room(checkpoint, num_bytes=num_bytes)
            checkpoint.mkdir()
            state = {"format": FORMAT, **vars(progress)}
            sums[STATE] = write_text(checkpoint / STATE, json.dumps(state))
            if keep:
                sums[KEPT] = write_text(checkpoint / KEPT, "")
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint} was made by the main process but process {world.rank} does not see it; "
            f"put run.dir on a file system that all machines share."
        )
    sums |= engine.save(checkpoint)
    with writing_together():
        if world.is_main:
            # Beside and renamed: where there is no room for it, there is no marker either.
            beside = checkpoint / f"{MARKER}.part"
            write_text(beside, json.dumps(sums))
            beside.rename(checkpoint / MARKER)


def make_room(checkpoint: Path, *, num_bytes: int) -> None:
    """Remove what is unfinished; raises OSError where the disk has no room for so many bytes."""
    folder = checkpoint.parent
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder.parent)
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise OSError(
            f"{folder} has {free / 2**20:,.1f} MiB free, and a checkpoint takes "
            f"{(num_bytes + SPARE_BYTES) / 2**20:,.1f}"
        )


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


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first: a kill in between leaves an ignored one."""
    (checkpoint / MARKER).unlink()
    shutil.rmtree(checkpoint)
