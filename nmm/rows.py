"""The rows of losses.jsonl, key by key (docs/scaling.md), and what is counted for them."""

import time
from collections.abc import Sequence

import torch

from nmm import parallel, rundir, schedule
from nmm.batch import Modality
from nmm.checkpoint import Progress
from nmm.config import Config
from nmm.engine import StepResult
from nmm.flops import flops, peak_flops_per_second
from nmm.heartbeat import Heartbeat
from nmm.log import Row
from nmm.parallel import World
from nmm.schedule import Phases
from nmm.tally import LABELS, TOKENS, loss_keys, token_keys


def count(
    totals: dict[str, int], result: StepResult, *, settings: Config, sources: Sequence[str]
) -> None:
    """Add a step to the cumulative keys of losses.jsonl; a skipped update counts no tokens."""
    counted = token_keys(result.tally, sources=sources, units=settings.data.units)
    counted["flops"] = _step_flops(result, settings)
    counted = (counted if result.applied else dict.fromkeys(counted, 0)) | result.counts
    for document in result.dropped:
        key = f"dropped/{document.reason}"
        counted[key] = counted.get(key, 0) + 1
    for key, value in counted.items():
        totals[key] = totals.get(key, 0) + value


def now(phases: Phases, progress: Progress) -> Row:
    """The keys of both logs that say when."""
    step = progress.step
    phase = schedule.phase_name(phases, step=step) if step > 0 else "start"
    return {"step": step, "phase": phase}


def losses(
    progress: Progress, result: StepResult, settings: Config, *, sources: Sequence[str]
) -> Row:
    """The keys of losses.jsonl that are the same however fast the machine is (docs/scaling.md)."""
    positions = settings.data.global_rows * settings.data.row_tokens
    tokens, labels = result.tally.count(TOKENS), result.tally.count(LABELS)
    return {
        **progress.totals,
        "fill_fraction": tokens / positions,
        "labels": labels,
        "lr": progress.learning_rate,
        **loss_keys(result.tally, sources=sources, units=settings.data.units),
        "grad_norm": result.grad_norm,
        **(result.routed.keys(settings.model.moe) if result.routed else {}),
        **(result.kept.keys(settings.model.mod) if result.kept else {}),
        **(_signals(result, settings, tokens=tokens, labels=labels) if result.signals else {}),
    }


def _signals(result: StepResult, settings: Config, *, tokens: int, labels: int) -> Row:
    """The keys signals/... of a step that was watched."""
    assert result.signals is not None
    return {
        **result.signals.keys(tokens=tokens, labels=labels),
        **(result.routed.signals(settings.model.moe) if result.routed else {}),
        **(result.kept.signals(settings.model.mod) if result.kept else {}),
    }


def speed(
    result: StepResult, settings: Config, *, started: float, heartbeat: Heartbeat, world: World
) -> Row:
    """The keys of losses.jsonl that depend on the machine and the moment."""
    seconds = time.perf_counter() - started
    rate = result.tally.count(TOKENS) / seconds
    peak = peak_flops_per_second(
        torch.cuda.get_device_name() if world.device.type == "cuda" else ""
    )
    return {
        "tokens_per_second": rate,
        "mfu": _step_flops(result, settings) / seconds / (peak * world.size) if peak else None,
        "seconds": seconds,
        **{f"seconds/{phase.name}": spent for phase, spent in heartbeat.seconds().items()},
        "peak_memory_bytes": parallel.peak_memory_bytes(world),
        "wall_time": rundir.wall_time(),
    }


def _step_flops(result: StepResult, settings: Config) -> int:
    """What the step's tokens cost to train on, by the convention of the scaling laws."""
    return flops(
        settings.model,
        tokens=result.tally.count(TOKENS),
        image_tokens=result.tally.count(TOKENS, modality=Modality.image),
    )
