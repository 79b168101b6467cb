"""From a study to its runs (launch/study/run.py); no torch.

whole    |--- warmup ---|------ constant ------|-- cooldown --|
trunk    |--- warmup ---|------ constant ---*------------*----|     * checkpoints that are kept
branch                                      |-- cooldown --|
seed     |--- warmup ---|---*-- constant ------|-- cooldown --|
upcycled                    |--- warmup ---|-- constant --|-- cooldown --|
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from launch.study.run import Cell, Role, StudyRun
from nmm.config import (
    DATA_KEYS,
    Design,
    FamilyConfig,
    MixtureConfig,
    SizeConfig,
    StudyConfig,
    compose,
    load,
)
from nmm.errors import UserError
from nmm.schedule import Phases, phases

NO_MIXTURE = ""  # the name of what is trained on where the study names no mixtures


def plan_runs(study: StudyConfig) -> list[StudyRun]:
    """Every run of the study, small sizes first, each trunk right before its branches.

    Raises UserError for what train.py could not run.
    """
    cells = sorted(_cells(study), key=lambda cell: cell.flops(1))
    return _with_seeds([run for cell in cells for run in _runs(cell, study)], study)


def _cells(study: StudyConfig) -> Iterator[Cell]:
    mixtures = study.mixtures or {NO_MIXTURE: MixtureConfig()}
    for family_name, family in study.families.items():
        for size_name, size in family.sizes.items():
            for mixture_name in family.mixtures or mixtures:
                mixture = mixtures[mixture_name]
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


def _with_seeds(runs: list[StudyRun], study: StudyConfig) -> list[StudyRun]:
    """The same runs; those of upcycled families begin from a checkpoint of their seed."""
    longest = {_place(run.cell, run.cell.family): run for run in runs}
    made: list[StudyRun] = []
    kept: dict[str, set[int]] = {}
    for run in runs:
        upcycle = study.families[run.cell.family].upcycle
        if upcycle is None:
            made.append(run)
            continue
        seed = longest[_place(run.cell, upcycle.family)]
        _refuse_other_rows(run, seed)
        step = round(upcycle.tokens / run.cell.step_tokens)
        if not 0 < step < min(seed.phases.total_steps, run.phases.total_steps):
            raise UserError(
                f"study.families.{run.cell.family}.upcycle.tokens is {upcycle.tokens:,}, which is "
                f"step {step} of {seed.name} and of {run.name}; give fewer tokens than they have."
            )
        lengths = _phases(run.cell, tokens=run.tokens - step * run.cell.step_tokens)
        kept.setdefault(seed.name, set()).add(step)
        begun = replace(run, role=Role.upcycled, phases=lengths, trunk=seed.name, first_step=step)
        made.append(begun)
    return [
        replace(run, keep_steps=tuple(sorted({*run.keep_steps, *kept.get(run.name, ())})))
        for run in made
    ]


def _refuse_other_rows(run: StudyRun, seed: StudyRun) -> None:
    """An upcycled run trains on the next rows of its seed, and counts the seed's steps as its."""
    own, of_seed = run.cell.config.data, seed.cell.config.data
    for key in (*DATA_KEYS, "units", "masking", "sources"):
        if getattr(own, key) != getattr(of_seed, key):
            raise UserError(
                f"{run.name} and {seed.name}, which it is made of, have other data.{key}: "
                f"{getattr(own, key)} and {getattr(of_seed, key)}; give both the same."
            )


def _place(cell: Cell, family: str) -> tuple[str, str, str, int]:
    return family, cell.size, cell.mixture, cell.seed


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
