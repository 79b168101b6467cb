"""eta: how many times fewer FLOPs, or seconds, a sparse model needs for a dense model's last loss.

arXiv 2407.21770 (MoMa): the sparse model matches the pre-training loss of the dense one with 1/eta
of its FLOPs. Training losses are running means over steps, because single steps jump with what
they hold. Held-out losses are of the same rows every time. Between two points of a curve FLOPs grow
as in arXiv 2112.10684, by the loss on their logarithm. An upcycled run has its seed's FLOPs and
seconds behind it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmm.errors import UserError
from nmm.log import Row, read_losses, read_rows
from nmm.scaling.lineage import folder_of, whole_log

WINDOW_FRACTION = 0.02  # of the logged rows that a mean is taken over


@dataclass(frozen=True)
class Eta:
    """For one loss; None where the sparse run never gets there.

    `seconds` is eta by the clock; None also where the log of a seed is gone.
    """

    loss: str
    dense_loss: float
    flops: float | None
    seconds: float | None
    matched_step: float | None


@dataclass(frozen=True)
class Curve:
    """The rows of a log that have losses, and the seconds spent until each (nan: not known)."""

    rows: list[Row]
    seconds: np.ndarray
    window: int

    @property
    def keys(self) -> set[str]:
        """The losses that at least one row has: overall and by modality."""
        found = {key for row in self.rows for key, value in row.items() if value is not None}
        return {key for key in found if key == "loss" or key.startswith("loss/modality/")}

    def of(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Places of the rows that have this loss, and means over the window that ends at each."""
        places = np.array([at for at, row in enumerate(self.rows) if row.get(key) is not None])
        sums = np.cumsum([0.0, *(self.rows[place][key] for place in places)])
        ends = np.arange(1, len(sums))
        begins = np.maximum(0, ends - self.window)
        return places, (sums[ends] - sums[begins]) / (ends - begins)


def eta(dense: Path, sparse: Path, *, held_out: bool = False) -> list[Eta]:
    """Overall and for every modality that both runs have a loss of, in training or held out."""
    curves = [_held_out(run) if held_out else _training(run) for run in (dense, sparse)]
    both = sorted(curves[0].keys & curves[1].keys)
    return [_matched(curves[0], curves[1], key=key) for key in both]


def _training(run: Path) -> Curve:
    read_losses(run)  # refuses a run without any
    rows = whole_log(run, "losses.jsonl")
    spent = _seconds_before(run) + _seconds(rows)
    return Curve(rows, spent, window=max(1, round(WINDOW_FRACTION * len(rows))))


def _held_out(run: Path) -> Curve:
    rows = [row for row in whole_log(run, "evals.jsonl") if row["step"] > 0]
    if not rows:
        raise UserError(
            f"{run / 'evals.jsonl'} has no evaluation after a step; give a run with "
            f"evaluation.every_steps, or leave out --held-out."
        )
    read_losses(run)
    trained = whole_log(run, "losses.jsonl")
    steps = [row["step"] for row in trained]
    spent = np.interp([row["step"] for row in rows], steps, _seconds(trained))
    return Curve(rows, _seconds_before(run) + spent, window=1)


def _seconds_before(run: Path) -> float:
    """Of the seed, where the run is upcycled; nan where the seed's log is gone."""
    manifest = run / "manifest.json"
    parent = (json.loads(manifest.read_text()) if manifest.exists() else {}).get("parent") or {}
    if parent.get("mode") == "branch":  # its steps, and the seconds of each, go on from its trunk's
        return _seconds_before(folder_of(parent, run))
    if parent.get("mode") != "upcycle":
        return 0.0
    seed = folder_of(parent, run)
    rows = read_rows(seed / "losses.jsonl")
    before = _seconds_before(seed)
    rows = [row for row in rows if row["step"] <= parent["step"]]
    return before + float(_seconds(rows)[-1]) if rows else math.nan


def _matched(dense: Curve, sparse: Curve, *, key: str) -> Eta:
    last, means = dense.of(key)
    target = float(means[-1])
    places, losses = sparse.of(key)
    reached = np.flatnonzero(losses <= target)
    if len(reached) == 0:
        return Eta(key, target, None, None, None)
    here = int(reached[0])
    there = max(0, here - 1)
    fallen = losses[there] - losses[here]
    share = float((losses[there] - target) / fallen) if fallen > 0 else 1.0

    def at(column: np.ndarray) -> float:
        ends = np.log(column[places[[there, here]]])
        return math.exp(ends[0] + share * (ends[1] - ends[0]))

    seconds = dense.seconds[last[-1]] / at(sparse.seconds)
    return Eta(
        loss=key,
        dense_loss=target,
        flops=dense.rows[last[-1]]["flops"] / at(_column(sparse.rows, "flops")),
        seconds=None if math.isnan(seconds) else float(seconds),
        matched_step=at(_column(sparse.rows, "step")),
    )


def _column(rows: Sequence[Row], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows], dtype=float)


def _seconds(rows: Sequence[Row]) -> np.ndarray:
    """Time of the steps until each row, which stands for all steps since the row before."""
    return np.cumsum(np.diff(_column(rows, "step"), prepend=0) * _column(rows, "seconds"))
