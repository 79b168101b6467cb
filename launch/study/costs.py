"""What runs cost: seconds as measured where a run of the size exists, else by FLOPs; disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from launch.study.run import Role, StudyRun
from launch.study.state import Folder
from nmm.config import DeviceConfig
from nmm.errors import UserError
from nmm.flops import num_parameters, peak_flops_per_second
from nmm.scaling.plan import CHECKPOINT_BYTES
from nmm.scaling.runs import TAIL_BYTES


@dataclass(frozen=True)
class Rates:
    """Seconds of a step: `measured` by the name of the cell, else FLOPs / `flops_per_second`."""

    measured: Mapping[str, float]
    flops_per_second: float

    def seconds(self, run: StudyRun, *, steps: int | None = None) -> float:
        """Of so many steps of a run, as a rule all its own ones; starts are not counted."""
        count = run.own_steps if steps is None else steps
        cell = run.cell
        return count * self.measured.get(cell.name, cell.flops(1) / self.flops_per_second)


def rates(runs: Sequence[StudyRun], folder: Folder, *, device: DeviceConfig) -> Rates:
    """From the logs that there are.

    A size without one is as fast per FLOP as the others, and without any the device is asked.
    """
    cells = {run.cell.name: run.cell for run in runs}
    measured: dict[str, float] = {}
    for run in runs:
        seconds = _step_seconds(folder.run(run.name) / "losses.jsonl")
        if seconds is not None:
            measured.setdefault(run.cell.name, seconds)
    if not measured:
        return Rates({}, planned_speed(device))
    speeds = [cells[name].flops(1) / seconds for name, seconds in measured.items()]
    return Rates(measured, median(speeds))


def planned_speed(device: DeviceConfig) -> float:
    """FLOPs per second of a run; raises UserError for a GPU that is not known."""
    if device.flops_per_second is not None:
        return device.flops_per_second
    peak = peak_flops_per_second(device.gpu)
    if peak is None:
        raise UserError(
            f"study.device.gpu is {device.gpu}, whose peak is not known; set "
            f"study.device.flops_per_second."
        )
    return peak * device.gpus * device.mfu


def _step_seconds(log: Path) -> float | None:
    """The median of the last rows of a log."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    found = []
    for line in lines[1:]:  # the first may be half a line
        try:
            found.append(json.loads(line)["seconds"])
        except (ValueError, KeyError):
            continue
    return median(found) if found else None


def disk_bytes(run: StudyRun) -> int:
    """Of the checkpoints that stay."""
    cell, keep = run.cell, run.cell.config.checkpoint.keep_last
    # The last checkpoint of a trunk is one of those it keeps.
    kept = len(run.keep_steps) + keep - (run.role is Role.trunk)
    return kept * CHECKPOINT_BYTES * num_parameters(cell.config.model).total
