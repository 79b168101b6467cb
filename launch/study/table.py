"""What a study prints: its plan, and how it stands."""

from collections.abc import Mapping, Sequence

from launch.study.costs import Rates, disk_bytes
from launch.study.run import StudyRun
from launch.study.state import Standing, State
from nmm.config import StudyConfig

HOUR = 3600


def plan_text(study: StudyConfig, runs: Sequence[StudyRun], *, rates: Rates) -> str:
    """A line a run, and what all cost together."""
    rows = [
        ("run", "N active", "of N", "tokens", "FLOPs", "steps", "hours", "GB"),
        *(_plan_row(run, rates=rates) for run in runs),
    ]
    lines = [f"study {study.name}", *(f"  {line}" for line in study.about), "", *_aligned(rows), ""]
    return "\n".join([*lines, *_totals(runs, rates=rates)])


def _plan_row(run: StudyRun, *, rates: Rates) -> tuple[str, ...]:
    parameters = run.cell.parameters
    return (
        run.name,
        quantity(parameters.N_active),
        quantity(parameters.N),
        quantity(run.tokens),
        f"{run.flops:.3g}",
        f"{run.begins_at}-{run.phases.total_steps}",
        f"{rates.seconds(run) / HOUR:.3g}",
        f"{disk_bytes(run) / 1e9:.3g}",
    )


def _totals(runs: Sequence[StudyRun], *, rates: Rates) -> list[str]:
    points = [run for run in runs if run.is_point]
    spent, alone = sum(run.own_flops for run in runs), sum(run.flops for run in points)
    trunks = len(runs) - len(points)
    hours = sum(rates.seconds(run) for run in runs) / HOUR
    basis = "as measured here" if rates.measured else f"at {rates.flops_per_second:.3g} FLOPs/s"
    shared = f" with {trunks} trunks ({alone:.4g} if every model were trained alone)"
    return [
        f"{len(points)} models of {min(run.tokens for run in points):.3g} to "
        f"{max(run.tokens for run in points):.3g} tokens and {min(r.flops for r in points):.3g} to "
        f"{max(run.flops for run in points):.3g} FLOPs",
        f"{spent:.4g} FLOPs to train{shared if trunks else ''}",
        f"{hours:,.4g} hours of runs {basis}; {sum(map(disk_bytes, runs)) / 1e9:,.4g} GB of "
        f"checkpoints",
    ]


def status_text(
    runs: Sequence[StudyRun], standings: Mapping[str, Standing], *, rates: Rates
) -> str:
    """A line a run that has begun, what is wrong with runs, and how much is done."""
    rows = [("run", "state", "step", "of")]
    rows += [
        (run.name, one.state.value, f"{one.step}", f"{run.phases.total_steps}")
        for run in runs
        if (one := standings[run.name]).state is not State.waiting
    ]
    said = _aligned(rows) if len(rows) > 1 else ["no run has begun"]
    return "\n".join([*said, *problems(runs, standings), summary(runs, standings, rates)])


def problems(runs: Sequence[StudyRun], standings: Mapping[str, Standing]) -> list[str]:
    """A line for every run that is no point, and why."""
    wrong = (State.failed, State.left_out)
    return [
        f"{one.state.value}: {run.name}: {one.note}"
        for run in runs
        if (one := standings[run.name]).state in wrong
    ]


def summary(runs: Sequence[StudyRun], standings: Mapping[str, Standing], rates: Rates) -> str:
    """ "12 of 48 models and 3 of 6 trunks finished, 40 % of the work"."""
    finished = [run for run in runs if standings[run.name].state is State.finished]
    of = {True: "models", False: "trunks"}
    counts = " and ".join(
        f"{sum(run.is_point is kind for run in finished)} of {total} {name}"
        for kind, name in of.items()
        if (total := sum(run.is_point is kind for run in runs))
    )
    return f"{counts} finished, {done_fraction(runs, standings, rates=rates):.0%} of the work"


def done_fraction(
    runs: Sequence[StudyRun], standings: Mapping[str, Standing], *, rates: Rates
) -> float:
    """Of the seconds of all runs, what is behind us."""
    done = sum(seconds_done(run, standings[run.name], rates=rates) for run in runs)
    return done / sum(rates.seconds(run) for run in runs)


def seconds_done(run: StudyRun, standing: Standing, *, rates: Rates) -> float:
    """Of the run's own steps; nothing more will be done for one that is finished or given up."""
    if standing.state in (State.finished, State.left_out, State.failed):
        return rates.seconds(run)
    return rates.seconds(run, steps=max(0, standing.step - run.begins_at))


def quantity(count: float) -> str:
    """2_500_000_000 -> "2.5B"."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.4g}{letter}"
    return f"{count:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    columns = list(zip(*rows, strict=True))
    first, *others = (max(map(len, column)) for column in columns)
    return [
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in rows
    ]
