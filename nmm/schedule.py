"""The learning rate as a pure function of (config, step); formulas and pictures in docs/scaling.md.

Steps count from 1: step s is the s-th update. A run is a warmup, a constant phase and a cooldown:

    step        1    2    3  |  4    5    6    7    8    9   10  | 11   12
    phase          warmup    |           constant                | cooldown
    rate      1/3  2/3   1   |  1    1    1    1    1    1    1  | f(.5) minimum
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor, sqrt
from typing import Literal

from nmm.config.schedule import Cooldown, ScheduleConfig
from nmm.errors import UserError

Phase = Literal["warmup", "constant", "cooldown"]

# (above this many steps, warmup steps), for dense and for sparse models: "Scaling Laws for Native
# Multimodal Models", appendix A.
PUBLISHED_WARMUP_STEPS = ((15_000, 5000), (4_999, 2500), (999, 1000))
LONGER_WARMUP_STEPS = ((19_999, 5000), (999, 2500))


@dataclass(frozen=True)
class Phases:
    """Lengths of the three phases, in steps; they follow each other without a gap."""

    warmup_steps: int
    constant_steps: int
    cooldown_steps: int

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.constant_steps + self.cooldown_steps


def phases(config: ScheduleConfig, *, tokens_per_step: int) -> Phases:
    """Lengths in steps; raises UserError when they do not fit into the total.

    A total in tokens rounds up to whole steps, a warmup or cooldown in tokens rounds down, and the
    constant phase takes what is left, so the three always add up to the total.
    """
    total = config.total_steps
    if total is None:
        assert config.total_tokens is not None, "ScheduleConfig holds exactly one total"
        total = -(-config.total_tokens // tokens_per_step)
    warmup = _steps(
        config.warmup_steps,
        tokens=config.warmup_tokens,
        key="warmup",
        tokens_per_step=tokens_per_step,
    )
    cooldown = _steps(
        config.cooldown_steps,
        tokens=config.cooldown_tokens,
        key="cooldown",
        tokens_per_step=tokens_per_step,
    )
    if warmup is None:
        warmup = default_warmup(total, longer=config.longer_warmup)
    if cooldown is None:
        cooldown = default_cooldown(max(0, total - warmup), fraction=config.cooldown_fraction)
    if warmup + cooldown > total:
        raise UserError(
            f"schedule.warmup_steps is {warmup} and schedule.cooldown_steps is {cooldown}, but "
            f"schedule.total_steps is {total} (one step is {tokens_per_step} tokens); shorten the "
            f"warmup or the cooldown, or lengthen the run."
        )
    return Phases(warmup, total - warmup - cooldown, cooldown)


def default_warmup(total_steps: int, *, longer: bool = False) -> int:
    """Published lengths from 1,000 steps on, at most half the run; a tenth of shorter runs."""
    published = LONGER_WARMUP_STEPS if longer else PUBLISHED_WARMUP_STEPS
    for above_steps, warmup_steps in published:
        if total_steps > above_steps:
            return min(warmup_steps, total_steps // 2)
    return total_steps // 10


def default_cooldown(steps: int, *, fraction: float | None) -> int:
    """Of `steps` after the warmup, as many that cooldown = fraction * constant, rounded down.

    None means no constant phase: all of them. Example: 120 steps at 0.2 are 100 + 20.
    """
    if fraction is None:
        return steps
    exact = Fraction(str(fraction))  # 0.2 is one fifth here, not the nearest binary number
    return floor(steps * exact / (1 + exact))


def phase_name(phases: Phases, *, step: int) -> Phase:
    """Phase of a step in 1..total_steps."""
    assert 1 <= step <= phases.total_steps, (step, phases)
    if step <= phases.warmup_steps:
        return "warmup"
    return "constant" if step <= phases.warmup_steps + phases.constant_steps else "cooldown"


def learning_rate(config: ScheduleConfig, *, phases: Phases, peak: float, step: int) -> float:
    """Rate of the update `step` in 1..total_steps.

    The warmup is linear and reaches the peak at its last step. The cooldown continues from the
    peak: its first step is already below, and the last step of the run has the minimum exactly.
    """
    phase = phase_name(phases, step=step)
    if phase == "warmup":
        return peak * step / phases.warmup_steps
    if phase == "constant":
        return peak
    before = phases.warmup_steps + phases.constant_steps
    return peak * cooldown_factor(config, time=(step - before) / phases.cooldown_steps)


def cooldown_factor(config: ScheduleConfig, *, time: float) -> float:
    """Fraction of the peak at `time` of the cooldown: 1 at 0, `min_fraction` exactly at 1."""
    minimum = config.min_fraction
    if time == 1:
        return minimum
    match config.cooldown:
        case Cooldown.inverse_sqrt_published:
            return 1 / sqrt(1 + time * (minimum**-2 - 1))
        case Cooldown.exponential:
            return minimum**time
        case Cooldown.inverse_sqrt:
            shape = _normalised_inverse_sqrt(time, steepness=config.cooldown_steepness)
        case Cooldown.one_minus_sqrt:
            shape = 1 - sqrt(time)
        case Cooldown.linear:
            shape = 1 - time
    return minimum + (1 - minimum) * shape


def _normalised_inverse_sqrt(time: float, *, steepness: float) -> float:
    """(g(t) - g(1)) / (1 - g(1)) with g(t) = (1 + steepness * t)^-1/2, without cancellation."""
    root, last = sqrt(1 + steepness * time), sqrt(1 + steepness)
    return (1 - time) * (last + 1) / (root * (last + root))


def _steps(steps: int | None, *, tokens: int | None, key: str, tokens_per_step: int) -> int | None:
    """A length in whole steps, from whichever of the two was given; None when neither was."""
    if tokens is None:
        return steps
    if 0 < tokens < tokens_per_step:
        raise UserError(
            f"schedule.{key}_tokens is {tokens} but one step is {tokens_per_step} tokens; "
            f"set it to 0 or to at least one step."
        )
    return tokens // tokens_per_step


def due(step: int, *, every: int, last: int) -> bool:
    """Is it time for what happens every `every` steps (0: never) and at the last one?"""
    return step == last or at_interval(step, every=every)


def at_interval(step: int, *, every: int) -> bool:
    """Is it time for what happens every `every` steps (0: never)?"""
    return every > 0 and step % every == 0
