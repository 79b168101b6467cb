"""Run directories as rows of numbers: sizes from the manifest, all else from the logs.

Only finished runs become points; every other one is listed with the reason. Of losses.jsonl only
the end is parsed, and of the rows before it the step, so that thousands of runs take seconds.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nmm.errors import UserError
from nmm.log import read_rows
from nmm.scaling.holes import hole_in
from nmm.scaling.lineage import ancestors
from nmm.scaling.points import Points
from nmm.scaling.table import refuse_doubtful

TAIL_BYTES = 65_536  # of losses.jsonl; a row has less than 4 KiB
WORSE = 1.1  # a last held-out loss above this many times its lowest is a divergence


@dataclass(frozen=True)
class Run:
    """A finished run. `losses` has every `loss...` key of its last evaluation."""

    directory: Path
    manifest: dict[str, Any]
    end: dict[str, Any]  # the last row of losses.jsonl
    losses: dict[str, float]
    tokens: int
    flops: float

    @property
    def size(self) -> int:
        """N that a token passes through: all parameters of a dense model."""
        return self.manifest["N_active"]


@dataclass(frozen=True)
class Runs:
    """What a folder holds; `left_out` maps a directory to the reason."""

    finished: list[Run]
    left_out: dict[str, str] = field(default_factory=dict)


def read_runs(folder: Path) -> Runs:
    """All runs in a folder, or the one that it is; raises UserError if none is finished."""
    runs = Runs([])
    for directory in _directories(folder):
        found = read_run(directory)
        if isinstance(found, Run):
            runs.finished.append(found)
        else:
            runs.left_out[str(directory)] = found
    if not runs.finished:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in runs.left_out.items())
        raise UserError(
            f"--runs is {folder}, which holds no finished run (a folder with manifest.json, "
            f"losses.jsonl and evals.jsonl).{reasons}"
        )
    return runs


def _directories(folder: Path) -> list[Path]:
    if (folder / "manifest.json").exists():
        return [folder]
    try:
        entries = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"--runs is {folder}, which cannot be read ({error.strerror}).") from None
    return [Path(entry) for entry in entries if os.path.exists(f"{entry}/manifest.json")]


def read_run(directory: Path) -> Run | str:
    """The run, or why it is left out."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        total, _, _ = manifest["total_steps"], manifest["N"], manifest["N_active"]
        end = last_row(directory / "losses.jsonl")
        evaluations = [row for row in read_rows(directory / "evals.jsonl") if row["step"] > 0]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable: {error}"
    for parent, _ in ancestors(directory, manifest):
        if reason := _no_beginning(parent):
            return reason
    if end is None or end["step"] < total:
        return f"unfinished: {end['step'] if end else 0} of {total} steps"
    if not evaluations or evaluations[-1]["step"] < total:
        last = evaluations[-1]["step"] if evaluations else None
        return f"no held-out loss at its last step {total}: the last evaluation is of step {last}"
    last = evaluations[-1]
    if reason := _divergence(evaluations, vocabulary=manifest.get("vocab_size")):
        return f"diverged: {reason}"
    if hole := hole_in(directory, first_step=_first_step(manifest)):
        return hole
    losses = {key: value for key, value in last.items() if key.startswith("loss") and value}
    return Run(directory, manifest, end, losses, tokens=last["tokens"], flops=last["flops"])


def _no_beginning(parent: dict[str, Any]) -> str | None:
    """Why a run with such a parent, or whose trunk has one, is no point; None if it may be."""
    match parent.get("mode"):
        case "weights":
            said = "so its tokens are not all it has seen"
            return f"it began with weights of {parent.get('run')}, {said}"
        case "auxiliary_routers":
            return f"it trained auxiliary routers of {parent.get('run')}, and nothing else"
    return None


def _first_step(manifest: dict[str, Any]) -> int:
    """The step before the first of its own log: that of its parent where the run is a branch."""
    parent = manifest.get("parent") or {}
    return parent["step"] if parent.get("mode") == "branch" else 0


def last_row(path: Path) -> dict[str, Any] | None:
    """The last complete row, read from the end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is half a line
    return json.loads(lines[-1]) if lines else None


def _divergence(evaluations: Sequence[dict[str, Any]], *, vocabulary: int | None) -> str | None:
    """Why the last held-out loss is none of a trained model; None if it is."""
    last = evaluations[-1].get("loss")
    finite = [row["loss"] for row in evaluations if row.get("loss") is not None]
    if last is None or not math.isfinite(last):
        return "its last held-out loss is no number"
    if last > WORSE * min(finite):
        return f"its held-out loss ends at {last:.3f} and was {min(finite):.3f}"
    if vocabulary and last >= math.log(vocabulary):
        return f"its held-out loss {last:.3f} is that of guessing among {vocabulary} ids"
    return None


def points_of(runs: Sequence[Run], *, loss: str) -> Points:
    """N (active), D, C and one key of the losses; N_v and D_v where some run has a vision encoder.

    S is the fraction of the parameters that a token does not pass through, U the tokens that are
    not a repetition, where all runs tell how large their sources are. Raises UserError for
    a run without that loss, and for copies of a run.
    """
    for run in runs:
        if loss not in run.losses:
            raise UserError(
                f"{run.directory} has no {loss!r} in its last evaluation; it has: "
                f"{', '.join(run.losses)}."
            )
    columns = {
        "N": [run.size for run in runs],
        "D": [run.tokens for run in runs],
        "C": [run.flops for run in runs],
    }
    if any(run.manifest.get("N_vision") for run in runs):
        columns["N_v"] = [run.manifest.get("N_vision", 0) for run in runs]
        columns["D_v"] = [run.end.get("tokens/modality/image", 0) for run in runs]
    if any(run.manifest["N"] != run.size for run in runs):
        columns["S"] = [1 - run.size / run.manifest["N"] for run in runs]
    if all("source_tokens" in run.manifest for run in runs):
        columns["U"] = [unique_tokens(run) for run in runs]
    arrays = {name: np.array(values, dtype=float) for name, values in columns.items()}
    measured = np.array([run.losses[loss] for run in runs])
    points = Points(arrays, measured, tuple(str(run.directory) for run in runs))
    refuse_doubtful(points, source="--runs")
    return points


def unique_tokens(run: Run) -> int:
    """Of every source what was drawn of it, but no more than it has; at most all of D."""
    drawn = (
        min(tokens, run.end.get(f"tokens/source/{name}", 0))
        for name, tokens in run.manifest["source_tokens"].items()
    )
    return min(run.tokens, sum(drawn))


def shares_of(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """share/NAME -> each run's share of its tokens from that source."""
    prefix = "tokens/source/"
    names = sorted(
        {key[len(prefix) :] for run in runs for key in run.end if key.startswith(prefix)}
    )
    return {
        f"share/{name}": np.array(
            [run.end.get(prefix + name, 0) / run.end["tokens"] for run in runs]
        )
        for name in names
    }


def labels_of(runs: Sequence[Run], *, key: str) -> list[str]:
    """A key of each run's config.yaml, like `model.width`, or of its manifest, as a word."""
    return [_label(run, key) for run in runs]


def _label(run: Run, key: str) -> str:
    if key in run.manifest:
        return str(run.manifest[key])
    path = run.directory / "config.yaml"
    try:
        node: Any = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
        for part in key.split("."):
            node = node[part]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(
            f"--group is {key}, which {path} does not have; give a key of config.yaml "
            f"(like model.width) or of manifest.json."
        ) from None
    return str(node)
