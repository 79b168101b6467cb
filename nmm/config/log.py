"""What a run writes beside its weights: loss log, evaluations, checkpoints, wandb."""

from dataclasses import dataclass, field
from enum import Enum

from nmm.config.check import at_least, positive
from nmm.errors import UserError

MOST_PROFILED_STEPS = 100
STORES = ("s3://", "gs://")  # those that list what they hold


class WandbMode(Enum):
    off = "off"
    offline = "offline"
    online = "online"


@dataclass
class LogConfig:
    """losses.jsonl gets a row every `every_steps`; `wandb_project` of wandb mirrors it.

    Runs of one `wandb_group` are shown together there; a branch is linked to its parent.

    Every `signals_every_steps` (0: never) the row also holds the keys signals/... of
    docs/scaling.md; such a step has a row in any case.

    The steps from the first to the second of `profile_steps` are traced (null: none), into
    traces/ of the run directory (nmm/trace.py).
    """

    every_steps: int = 1
    signals_every_steps: int = 10
    profile_steps: list[int] | None = None
    wandb: WandbMode = WandbMode.offline
    wandb_project: str = "nmm"
    wandb_group: str | None = None

    def __post_init__(self) -> None:
        positive(log__every_steps=self.every_steps)
        at_least(0, log__signals_every_steps=self.signals_every_steps)
        if self.profile_steps is not None:
            _check_profile_steps(self.profile_steps)


def _check_profile_steps(steps: list[int]) -> None:
    is_range = len(steps) == 2 and 0 < steps[0] <= steps[1]
    if not is_range or steps[1] - steps[0] >= MOST_PROFILED_STEPS:
        raise UserError(
            f"log.profile_steps is {steps}; give the first and the last step to trace, at most "
            f"{MOST_PROFILED_STEPS}, for example [20,22]: a trace is held in memory."
        )


@dataclass
class CheckpointConfig:
    """A checkpoint every `every_steps` and at the end; the newest `keep_last` are kept.

    Those of `keep_steps`, and every `keep_every_steps` (0: never), are made and kept for good, for
    example as the points where other runs branch off.

    Each is copied to `upload_to` (null: nowhere), an s3:// or gs:// URL, in the folder of the run's
    name there, while training goes on. A start without any takes the newest back from there.
    """

    every_steps: int = 1000
    keep_last: int = 2
    keep_every_steps: int = 0
    keep_steps: list[int] = field(default_factory=list)
    upload_to: str | None = None

    def __post_init__(self) -> None:
        positive(checkpoint__every_steps=self.every_steps, checkpoint__keep_last=self.keep_last)
        at_least(0, checkpoint__keep_every_steps=self.keep_every_steps)
        for step in self.keep_steps:
            positive(checkpoint__keep_steps=step)
        if self.upload_to is not None and not self.upload_to.startswith(STORES):
            raise UserError(
                f"checkpoint.upload_to is {self.upload_to}; give a folder of an object store, such "
                f"as s3://bucket/folder or gs://bucket/folder, or leave it out."
            )


@dataclass
class EvaluationConfig:
    """Held-out losses every `every_steps` (0: only at the end), and at the start if `at_start`.

    At most `rows_per_source` rows of each source are read.
    """

    every_steps: int = 0
    at_start: bool = False
    rows_per_source: int = 64

    def __post_init__(self) -> None:
        at_least(0, evaluation__every_steps=self.every_steps)
        positive(evaluation__rows_per_source=self.rows_per_source)
