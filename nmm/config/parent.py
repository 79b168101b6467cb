"""The run whose checkpoint another run begins from."""

from dataclasses import dataclass
from enum import Enum

from nmm.config.check import positive
from nmm.errors import UserError


class ParentMode(Enum):
    """What a run takes of its parent's checkpoint.

    branch   everything: it trains on the parent's next batches, with a schedule of its own
    weights  the weights alone: step, optimizer, data and counts begin anew
    upcycle  the weights, of which experts are made (nmm/upcycle.py), and the place in the data: it
             trains on the parent's next batches with a new schedule, optimizer and routers
    auxiliary_routers  the weights, which stay as they are; what is trained are new routers
                       (model.moe.auxiliary_routers), all else begins anew as with `weights`
    """

    branch = "branch"
    weights = "weights"
    upcycle = "upcycle"
    auxiliary_routers = "auxiliary_routers"


@dataclass
class ParentConfig:
    """The directory of another run, and the step of one of its checkpoints; null: no parent.

    A run with checkpoints of its own continues from those, whether or not the parent still exists.
    """

    run: str | None = None
    step: int | None = None
    mode: ParentMode = ParentMode.branch

    def __post_init__(self) -> None:
        positive(parent__step=self.step)
        if (self.run is None) != (self.step is None):
            raise UserError(
                f"parent.run is {self.run} and parent.step is {self.step}; give both, the "
                f"directory of a run and the step of one of its checkpoints, or neither."
            )
