"""A run of a study: its name, overrides of train.py, lengths, size and FLOPs; no torch."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from nmm.config import Config, ScheduleConfig
from nmm.flops import Parameters, flops, num_parameters
from nmm.schedule import Phases


class Role(Enum):
    """A trunk is trained at a constant rate and is no point of a law; the others are."""

    trunk = "trunk"
    branch = "branch"
    whole = "whole"
    upcycled = "upcycled"


@dataclass(frozen=True)
class Cell:
    """What runs of all lengths have in common: an architecture, a size, a mixture and a seed.

    `words` are the overrides of train.py without lengths; `image_fraction` of the tokens are
    expected to be images.
    """

    family: str
    size: str
    mixture: str
    seed: int
    words: tuple[str, ...]
    config: Config
    image_fraction: float
    slots: int
    nodes: int

    @property
    def group(self) -> str:
        """Runs of one group are the points of one law."""
        return "-".join(part for part in (self.family, self.mixture) if part)

    @property
    def name(self) -> str:
        parts = [self.family, self.size, self.mixture, f"s{self.seed}" if self.seed else ""]
        return "-".join(part for part in parts if part)

    @property
    def step_tokens(self) -> int:
        return self.config.data.global_rows * self.config.data.row_tokens

    @property
    def parameters(self) -> Parameters:
        return num_parameters(self.config.model)

    def flops(self, steps: int) -> int:
        """Training FLOPs of so many steps by the convention of the laws."""
        tokens = steps * self.step_tokens
        images = round(tokens * self.image_fraction)
        return flops(self.config.model, tokens=tokens, image_tokens=images)


@dataclass(frozen=True)
class StudyRun:
    """A run of the study. It leaves its `trunk` at `first_step`; of a trunk, or of the seed of
    upcycled runs, the checkpoints of `keep_steps` are kept for them. Steps of an upcycled run count
    from 0.
    """

    name: str
    cell: Cell
    role: Role
    phases: Phases
    trunk: str | None = None
    first_step: int = 0
    keep_steps: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Behind it at its end, those of its trunk or seed as well."""
        return (self.own_steps + self.first_step) * self.cell.step_tokens

    @property
    def flops(self) -> int:
        """Of the tokens above: C of the laws."""
        return self.cell.flops(self.own_steps + self.first_step)

    @property
    def own_steps(self) -> int:
        return self.phases.total_steps - self.begins_at

    @property
    def begins_at(self) -> int:
        """Its step before the first of its own."""
        return self.first_step if self.role is Role.branch else 0

    @property
    def own_flops(self) -> int:
        """What it costs by itself."""
        return self.cell.flops(self.own_steps)

    @property
    def is_point(self) -> bool:
        return self.role is not Role.trunk

    def words(self, *, runs: Path, group: str, parent_step: int | None = None) -> list[str]:
        """All overrides of train.py. A branch leaves its trunk at `parent_step`, as a rule at
        `first_step`, or earlier where the trunk has no such checkpoint.
        """
        words = [
            *self.cell.words,
            f"run.name={self.name}",
            f"run.dir={runs}",
            f"log.wandb_group={group}",
            *_length_words(self.phases, self.cell.config.schedule),
        ]
        if self.keep_steps:
            words.append(f"checkpoint.keep_steps={list(self.keep_steps)}".replace(" ", ""))
        if self.trunk is not None:
            step = self.first_step if parent_step is None else parent_step
            words += [f"parent.run={runs / self.trunk}", f"parent.step={step}"]
        if self.role is Role.upcycled:
            words.append("parent.mode=upcycle")
        return words


def _length_words(lengths: Phases, schedule: ScheduleConfig) -> list[str]:
    """Steps, and no tokens where a preset had given some."""
    given = (schedule.warmup_tokens, schedule.cooldown_tokens)
    unset = [
        f"schedule.{name}_tokens=null"
        for name, tokens in zip(("warmup", "cooldown"), given, strict=True)
        if tokens is not None
    ]
    return [
        f"schedule.total_steps={lengths.total_steps}",
        f"schedule.warmup_steps={lengths.warmup_steps}",
        f"schedule.cooldown_steps={lengths.cooldown_steps}",
        *unset,
    ]
