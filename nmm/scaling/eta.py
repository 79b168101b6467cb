"""eta: how many times fewer FLOPs, or seconds, a sparse model needs for a dense model's last loss.

arXiv 2407.21770 (MoMa): the sparse model matches the pre-training loss of the dense one with 1/eta
of its FLOPs. Losses are running means over steps, because single steps jump with what they hold.
An upcycled run has its seed's FLOPs and seconds behind it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmm.log import Row, read_losses, read_rows

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
    matched_step: int | None


def eta(dense: Path, sparse: Path) -> list[Eta]:
    """Overall and for every modality that both runs have a loss of."""
    rows = [read_losses(run) for run in (dense, sparse)]
    before = [_seconds_before(run) for run in (dense, sparse)]
    measured = [
        {key for row in one for key, value in row.items() if value is not None} for one in rows
    ]
    both = sorted(measured[0] & measured[1])
    keys = [key for key in both if key == "loss" or key.startswith("loss/modality/")]
    return [_matched(rows[0], rows[1], key=key, before=before) for key in keys]


def _seconds_before(run: Path) -> float | None:
    """Of the seed, where the run is upcycled; None where the seed's log is gone."""
    manifest = run / "manifest.json"
    parent = (json.loads(manifest.read_text()) if manifest.exists() else {}).get("parent") or {}
    if parent.get("mode") != "upcycle":
        return 0.0
    rows = read_rows(Path(parent["run"]) / "losses.jsonl")
    before = _seconds_before(Path(parent["run"]))
    if before is None or not rows:
        return None
    return before + _seconds([row for row in rows if row["step"] <= parent["step"]])


def _matched(
    dense: Sequence[Row], sparse: Sequence[Row], *, key: str, before: Sequence[float | None]
) -> Eta:
    target = _smooth(dense, key=key)[1][-1]
    places, losses = _smooth(sparse, key=key)
    reached = np.flatnonzero(losses <= target)
    if len(reached) == 0:
        return Eta(key, float(target), None, None, None)
    place = int(places[reached[0]])
    row = sparse[place]
    seconds = None
    if before[0] is not None and before[1] is not None:
        spent = before[1] + _seconds(sparse[: place + 1])
        seconds = (before[0] + _seconds(dense)) / spent
    return Eta(
        loss=key,
        dense_loss=float(target),
        flops=dense[-1]["flops"] / row["flops"],
        seconds=seconds,
        matched_step=row["step"],
    )


def _smooth(rows: Sequence[Row], *, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Places of the rows that have this loss, and means over the window that ends at each."""
    places = np.array([place for place, row in enumerate(rows) if row.get(key) is not None])
    values = np.array([rows[place][key] for place in places])
    window = max(1, round(WINDOW_FRACTION * len(values)))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - window)
    return places, (sums[ends] - sums[begins]) / (ends - begins)


def _seconds(rows: Sequence[Row]) -> float:
    """Time of the steps up to the last row; a row stands for all steps since the row before."""
    steps = np.array([row["step"] for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    return float((np.diff(steps, prepend=0) * seconds).sum())
