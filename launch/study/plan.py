"""From a study to its runs: names, overrides of train.py, lengths, sizes and FLOPs; no torch.

whole    |--- warmup ---|------ constant ------|-- cooldown --|
trunk    |--- warmup ---|------ constant ---*------------*----|     * checkpoints that are kept
branch                                      |-- cooldown --|
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path

from nmm.config import (
    Config,
    Design,
    FamilyConfig,
    MixtureConfig,
    ScheduleConfig,
    SizeConfig,
    StudyConfig,
    compose,
    load,
)
from nmm.errors import UserError
from nmm.flops import Parameters, flops, num_parameters
from nmm.schedule import Phases, phases

NO_MIXTURE = ""  # the name of what is trained on where the study names no mixtures


class Role(Enum):
    """A trunk is trained at a constant rate and is no point of a law; the others are."""

    trunk = "trunk"
    branch = "branch"
    whole = "whole"


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
    """A run of the study. It trains the steps after `first_step`; `keep_steps` are a trunk's
    checkpoints to branch off from.
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
        """Behind it at its end, those of its trunk as well."""
        return self.phases.total_steps * self.cell.step_tokens

    @property
    def flops(self) -> int:
        """Of the tokens above: C of the laws."""
        return self.cell.flops(self.phases.total_steps)

    @property
    def own_steps(self) -> int:
        return self.phases.total_steps - self.first_step

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
        if self.role is Role.trunk:
            words.append(f"checkpoint.keep_steps={list(self.keep_steps)}".replace(" ", ""))
        if self.trunk is not None:
            step = self.first_step if parent_step is None else parent_step
            words += [f"parent.run={runs / self.trunk}", f"parent.step={step}"]
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


def plan_runs(study: StudyConfig) -> list[StudyRun]:
    """Every run of the study, small sizes first, each trunk right before its branches.

    Raises UserError for what train.py could not run.
    """
    cells = sorted(_cells(study), key=lambda cell: cell.flops(1))
    return [run for cell in cells for run in _runs(cell, study)]


def _cells(study: StudyConfig) -> Iterator[Cell]:
    mixtures = study.mixtures or {NO_MIXTURE: MixtureConfig()}
    for family_name, family in study.families.items():
        for size_name, size in family.sizes.items():
            for mixture_name, mixture in mixtures.items():
                base = _base(study, family, size, mixture)
                settings = load(compose(base))
                for seed in study.seeds:
                    share = size.image_fraction
                    yield Cell(
                        family=family_name,
                        size=size_name,
                        mixture=mixture_name,
                        seed=seed,
                        words=(*base[:-1], *([f"run.seed={seed}"] if seed else [])),
                        config=settings,
                        image_fraction=mixture.image_fraction if share is None else share,
                        slots=size.slots,
                        nodes=size.nodes or study.slurm.nodes,
                    )


def _base(
    study: StudyConfig, family: FamilyConfig, size: SizeConfig, mixture: MixtureConfig
) -> list[str]:
    """Overrides of train.py; the last one is a length that stands in for those of the runs."""
    words = [*study.overrides, *family.overrides, *mixture.overrides, *size.overrides]
    length = "schedule.total_tokens=1"
    if not mixture.weights:
        return [*words, length]
    sources = _sources((*words, length))
    if missing := sorted(mixture.weights.keys() - set(sources)):
        raise UserError(
            f"study.mixtures gives {missing[0]} a weight, but the sources are "
            f"{', '.join(sources)}; name one of them."
        )
    dropped = [f"~data.sources.{name}" for name in sources if name not in mixture.weights]
    weighed = [f"data.sources.{name}.weight={w}" for name, w in mixture.weights.items()]
    return [*words, *dropped, *weighed, length]


@cache
def _sources(words: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the sources that these overrides give; mixtures of a size ask the same."""
    return tuple(load(compose(list(words))).data.sources)


def _runs(cell: Cell, study: StudyConfig) -> Iterator[StudyRun]:
    family = study.families[cell.family]
    budgets = study.budgets(family, family.sizes[cell.size])
    lengths = {tokens: _phases(cell, tokens=tokens) for tokens in sorted(budgets)}
    if study.design is Design.whole:
        for tokens, one in lengths.items():
            yield StudyRun(f"{study.name}-{cell.name}-{short(tokens)}", cell, Role.whole, one)
        return
    for tokens, one in lengths.items():
        if one.constant_steps == 0:
            raise UserError(
                f"a run of {tokens:,} tokens of {cell.name} has no constant phase to branch off "
                f"from; set study.design=whole, or a schedule with a constant phase."
            )
        if one.cooldown_steps == 0:
            raise UserError(
                f"a run of {tokens:,} tokens of {cell.name} has no step of cooldown for its branch "
                f"to take; give it more tokens, or set study.design=whole."
            )
    for warmup in sorted({one.warmup_steps for one in lengths.values()}):
        of_trunk = {tokens: one for tokens, one in lengths.items() if one.warmup_steps == warmup}
        yield from _trunk_and_branches(cell, study.name, warmup=warmup, lengths=of_trunk)


def _phases(cell: Cell, *, tokens: int) -> Phases:
    schedule = replace(cell.config.schedule, total_tokens=tokens)
    return phases(schedule, tokens_per_step=cell.step_tokens)


def _trunk_and_branches(
    cell: Cell, study: str, *, warmup: int, lengths: dict[int, Phases]
) -> Iterator[StudyRun]:
    points = {tokens: one.warmup_steps + one.constant_steps for tokens, one in lengths.items()}
    last = max(points.values())
    trunk = StudyRun(
        f"{study}-{cell.name}-trunk{warmup}",
        cell,
        Role.trunk,
        Phases(warmup, last - warmup, 0),
        keep_steps=tuple(sorted(set(points.values()))),
    )
    yield trunk
    for tokens, one in lengths.items():
        yield StudyRun(
            f"{study}-{cell.name}-{short(tokens)}",
            cell,
            Role.branch,
            one,
            trunk=trunk.name,
            first_step=points[tokens],
        )


def short(tokens: int) -> str:
    """2_500_000_000 -> "2p5b": exact, and fit for the name of a folder."""
    for unit, letter in ((10**9, "b"), (10**6, "m"), (10**3, "k")):
        if tokens >= unit and tokens % (unit // 1000) == 0:
            whole, rest = divmod(tokens, unit)
            decimals = f"{rest * 1000 // unit:03d}".rstrip("0")
            return f"{whole}{'p' + decimals if decimals else ''}{letter}"
    return str(tokens)
