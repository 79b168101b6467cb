"""Where the runs of a study stand: read from their folders and the study's notes, never kept.

Whoever kills the launcher loses nothing, because nothing is known that is not on disk.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from launch.study.run import Role, StudyRun
from nmm import rundir
from nmm.errors import UserError
from nmm.log import read_rows
from nmm.rundir import write_whole
from nmm.scaling.runs import Run, last_row, read_run

FAILURES = "failures.json"
NOTES = 400  # characters of what a failed run said last


class State(Enum):
    """Of a run.

    waiting      not begun, or it waits for its trunk
    running      some process trains it
    interrupted  begun, and to be continued
    finished     all steps and the last evaluation are done
    left_out     it cannot be a point: it diverged, or its log has holes
    failed       it failed more often than study.retries allows
    """

    waiting = "waiting"
    running = "running"
    interrupted = "interrupted"
    finished = "finished"
    left_out = "left out"
    failed = "failed"


DONE = (State.finished, State.left_out)
STILL = (State.waiting, State.interrupted)


@dataclass(frozen=True)
class Standing:
    """`step` is the last one in its log; `note` says why a run is no point."""

    state: State
    step: int = 0
    note: str = ""


@dataclass(frozen=True)
class Folder:
    """Where a study keeps its runs, and its notes beside them."""

    runs: Path
    name: str

    @property
    def notes(self) -> Path:
        return self.runs / self.name

    def run(self, name: str) -> Path:
        return self.runs / name

    def lock(self) -> AbstractContextManager:
        """One launcher of a study at a time; raises UserError for the second."""
        try:
            return rundir.lock(self.notes, is_main=True)
        except UserError:
            raise UserError(
                f"{self.notes} cannot be used: another launcher runs this study, or the folder "
                f"cannot be written; wait for it or stop it, or give another study.dir."
            ) from None

    def failures(self) -> dict[str, list[str]]:
        """What every run said last when it failed, since the last `retry`."""
        path = self.notes / FAILURES
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError:
            raise UserError(f"{path} is damaged; delete it: it only counts failures.") from None

    def add_failure(self, name: str, *, said: str) -> None:
        """Count a failure of a run."""
        failures = self.failures()
        failures.setdefault(name, []).append(said[-NOTES:])
        self.write(FAILURES, json.dumps(failures, indent=1))

    def forget_failures(self) -> None:
        """All runs may fail as often as at first."""
        self.write(FAILURES, "{}")

    def write(self, name: str, text: str) -> None:
        """A file of the notes, whole or not at all."""
        (self.notes / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.notes / name, text)


def standings_of(runs: Sequence[StudyRun], folder: Folder, *, retries: int) -> dict[str, Standing]:
    """Of all runs of a study."""
    failures = folder.failures()
    found = {
        run.name: standing(run, folder, failures=failures.get(run.name, []), retries=retries)
        for run in runs
    }
    return {**found, **consequences(runs, found, folder=folder)}


def consequences(
    runs: Sequence[StudyRun], standings: Mapping[str, Standing], *, folder: Folder
) -> dict[str, Standing]:
    """What follows for runs that are still to be done from what became of others.

    A trunk whose branches are all done is not needed; a run whose trunk or seed was left out before
    it could begin there is left out too.
    """
    changed = {}
    for run in runs:
        if standings[run.name].state not in STILL:
            continue
        branches = [standings[other.name] for other in runs if other.trunk == run.name]
        is_trunk = run.role is Role.trunk
        if is_trunk and branches and all(one.state in DONE for one in branches):
            changed[run.name] = Standing(State.finished, run.phases.total_steps, "not needed")
        if run.trunk is None or standings[run.trunk].state is not State.left_out:
            continue
        if parent_step(run, folder) is None:
            note = f"its trunk {run.trunk} was left out at step {standings[run.trunk].step}"
            changed[run.name] = Standing(State.left_out, 0, note)
    return changed


def standing(run: StudyRun, folder: Folder, *, failures: Sequence[str], retries: int) -> Standing:
    """How far the run is; `failures` are those of this run."""
    directory = folder.run(run.name)
    step = last_step(directory)
    if rundir.is_locked(directory):
        return Standing(State.running, step)
    manifest = read_manifest(directory)
    if step >= run.phases.total_steps and (done := _done(run, directory)):
        return done
    if ended(manifest) == "diverged":
        return Standing(State.left_out, step, "diverged: an update or held-out loss is no number")
    if len(failures) > retries:
        return Standing(State.failed, step, f"{len(failures)} times, last: {failures[-1]}")
    return Standing(State.interrupted if manifest else State.waiting, step)


def _done(run: StudyRun, directory: Path) -> Standing | None:
    """Of a run whose log has reached its end; None if something is still to be done."""
    step = run.phases.total_steps
    if run.role is Role.trunk:
        return Standing(State.finished, step) if step in checkpoints(directory) else None
    if not any(row["step"] == step for row in read_rows(directory / "evals.jsonl")):
        return None
    found = read_run(directory)
    if isinstance(found, Run):
        return Standing(State.finished, step)
    return Standing(State.left_out, step, found)


def ended(manifest: dict[str, Any] | None) -> str | None:
    """How the last start ended, as far as it could note that."""
    starts = (manifest or {}).get("starts") or [{}]
    return (starts[-1].get("ended") or {}).get("how")


def last_step(directory: Path) -> int:
    """Of the log; 0 where there is none, or it cannot be read."""
    try:
        row = last_row(directory / "losses.jsonl")
        return 0 if row is None else row["step"]
    except (OSError, ValueError, KeyError):
        return 0


def read_manifest(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / rundir.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None


def checkpoints(directory: Path) -> list[int]:
    """The steps of its complete checkpoints, in order."""
    found = (directory / "checkpoints").glob("step_????????/COMPLETE")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in found)


def parent_step(run: StudyRun, folder: Folder) -> int | None:
    """Where a run leaves its trunk or seed: as it began, else where it is planned; None: not yet
    there.

    A trunk that has passed that step without keeping it is left at the checkpoint before, in its
    constant phase; the branch then takes the steps in between by itself, to the bit the same.
    """
    assert run.trunk is not None
    begun = read_manifest(folder.run(run.name)) or {}
    if begun.get("parent"):
        return begun["parent"]["step"]
    kept = checkpoints(folder.run(run.trunk))
    if run.first_step in kept:
        return run.first_step
    if run.role is Role.upcycled:
        return None
    usable = [step for step in kept if run.phases.warmup_steps <= step < run.first_step]
    return usable[-1] if usable and kept[-1] > run.first_step else None


# What may change between two starts of a study: where things are, how fast and how much is kept.
FREE = ("run.dir", "run.max_minutes", "run.timeout_minutes", "parent.", "log.", "checkpoint.")
FREE += ("engine.micro_batch", "engine.activation_checkpointing", "data.workers", "data.cache")


def refuse_other_runs(runs: Sequence[StudyRun], folder: Folder) -> None:
    """Do not take for a run of the study what was made with other overrides, under its name."""
    if (folder.notes / rundir.MANIFEST).exists():
        raise UserError(
            f"{folder.notes} is a run, and the study wants to keep its notes there; give another "
            f"study.dir or study.name."
        )
    for run in runs:
        made = _read_overrides(folder.run(run.name))
        if made is None:
            continue
        planned = _settings(run.words(runs=folder.runs, group=folder.name))
        if run.role is Role.trunk:  # it may grow for a further budget
            made.pop("schedule.total_steps", None)
            planned.pop("schedule.total_steps", None)
        for key in sorted(planned.keys() | made.keys()):
            if planned.get(key) != made.get(key):
                raise UserError(
                    f"{folder.run(run.name)} was made with {made.get(key, f'no {key}')} and the "
                    f"study says {planned.get(key, f'no {key}')}; give another study.name or "
                    f"study.dir, or the old value."
                )


def _read_overrides(directory: Path) -> dict[str, str] | None:
    path = directory / "overrides.txt"
    return _settings(path.read_text().splitlines()) if path.exists() else None


def _settings(words: Sequence[str]) -> dict[str, str]:
    """Every override by its key; the last one of a key counts."""
    return {key: word for word in words if not (key := word.partition("=")[0]).startswith(FREE)}
