"""The optimizer's constants; the learning rate's course over time is in nmm/config/schedule.py."""

from dataclasses import dataclass
from enum import Enum

from nmm.config.check import at_least, fraction, positive
from nmm.errors import UserError


class OptimName(Enum):
    adamw = "adamw"
    sgd = "sgd"


@dataclass
class OptimConfig:
    """`learning_rate` is the peak, `weight_decay` is fully decoupled, `clip_norm` 0 clips nothing.

    A step at the peak shrinks a weight by `weight_decay`. The vision encoder of a late-fusion
    model learns at the rate of the others times `vision_rate_multiplier`; 0 freezes it.
    """

    name: OptimName = OptimName.adamw
    learning_rate: float = 1.5e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    vision_rate_multiplier: float = 0.01

    def __post_init__(self) -> None:
        positive(optim__learning_rate=self.learning_rate, optim__eps=self.eps)
        fraction(optim__weight_decay=self.weight_decay)
        at_least(0, optim__clip_norm=self.clip_norm)
        at_least(0, optim__vision_rate_multiplier=self.vision_rate_multiplier)
        for key, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise UserError(f"optim.{key} is {value}; set it to at least 0 and below 1.")
        if self.name is OptimName.sgd:
            self._check_plain()

    def _check_plain(self) -> None:
        """Plain gradient descent has no moments."""
        for key in ("beta1", "beta2", "eps"):
            if (value := getattr(self, key)) != getattr(OptimConfig, key):
                raise UserError(
                    f"optim.{key} is {value} and optim.name is sgd, which has none; leave "
                    f"optim.{key} out, or set optim.name=adamw."
                )
