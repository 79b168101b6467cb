"""The learning rate over time: warmup, constant phase, cooldown; lengths in tokens or in steps."""

from dataclasses import dataclass
from enum import Enum
from math import isfinite

from nmm.config.check import at_least, fraction, positive
from nmm.errors import UserError


class Cooldown(Enum):
    """Shapes of the last phase; formulas and pictures in docs/scaling.md."""

    inverse_sqrt = "inverse_sqrt"
    inverse_sqrt_published = "inverse_sqrt_published"
    one_minus_sqrt = "one_minus_sqrt"
    linear = "linear"
    exponential = "exponential"


@dataclass
class ScheduleConfig:
    """Exactly one of `total_tokens` and `total_steps`; warmup and cooldown have the same pair.

    Tokens are counted as planned positions, padding included: a step is
    `data.global_rows * data.row_tokens`. Without a warmup length it follows from the total
    (nmm/schedule.py); `longer_warmup` is the published rule for sparse models. Without a cooldown
    length it is `cooldown_fraction` of the constant phase, or with null everything after the
    warmup. `min_fraction` is the final learning rate as a fraction of the peak.
    `cooldown_steepness` belongs to the inverse square root.
    """

    total_tokens: int | None = None
    total_steps: int | None = None
    warmup_tokens: int | None = None
    warmup_steps: int | None = None
    longer_warmup: bool = False
    cooldown_tokens: int | None = None
    cooldown_steps: int | None = None
    cooldown_fraction: float | None = 0.2
    cooldown: Cooldown = Cooldown.inverse_sqrt
    cooldown_steepness: float = 15.0
    min_fraction: float = 0.0

    def __post_init__(self) -> None:
        positive(schedule__total_tokens=self.total_tokens, schedule__total_steps=self.total_steps)
        at_least(0, schedule__warmup_tokens=self.warmup_tokens)
        at_least(0, schedule__warmup_steps=self.warmup_steps)
        at_least(0, schedule__cooldown_tokens=self.cooldown_tokens)
        at_least(0, schedule__cooldown_steps=self.cooldown_steps)
        at_least(0, schedule__cooldown_fraction=self.cooldown_fraction)
        if self.cooldown_fraction is not None and not isfinite(self.cooldown_fraction):
            raise UserError(
                f"schedule.cooldown_fraction is {self.cooldown_fraction}; set a number, or null "
                f"for a cooldown that starts right after the warmup."
            )
        positive(schedule__cooldown_steepness=self.cooldown_steepness)
        fraction(schedule__min_fraction=self.min_fraction)
        for phase in ("total", "warmup", "cooldown"):
            tokens, steps = getattr(self, f"{phase}_tokens"), getattr(self, f"{phase}_steps")
            if tokens is not None and steps is not None:
                raise UserError(
                    f"schedule.{phase}_tokens is {tokens} and schedule.{phase}_steps is {steps}; "
                    f"give one of them and set the other to null."
                )
        published = self.cooldown in (Cooldown.inverse_sqrt_published, Cooldown.exponential)
        if published and self.min_fraction == 0:
            raise UserError(
                f"schedule.cooldown is {self.cooldown.name} and schedule.min_fraction is 0; this "
                f"shape cannot end at 0: set schedule.min_fraction above 0, or choose inverse_sqrt."
            )
