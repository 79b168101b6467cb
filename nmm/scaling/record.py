"""What `fit` writes down: a law, its evidence and what follows from it, as one JSON object."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from nmm.errors import UserError
from nmm.scaling import allocation, holdout
from nmm.scaling.bootstrap import bootstrap, intervals
from nmm.scaling.files import Record
from nmm.scaling.fit import DELTA, AnyLaw, Fit, Solver, fit_law
from nmm.scaling.laws import EPOCH_GRID, NMM_GRID
from nmm.scaling.mixing import best_of_all
from nmm.scaling.mixtures import MixtureLaw
from nmm.scaling.points import Points

GRIDS = {"nmm": NMM_GRID, "epoch": EPOCH_GRID}


@dataclass(frozen=True)
class Options:
    """How to fit; the fields are the flags of `fit`."""

    delta: float = DELTA
    drop_highest: int = 0
    resamples: int = 0
    seed: int = 0
    holdout: str | None = None
    grid: str = "nmm"
    solver: Solver = Solver.batched
    spaced: str = "log"
    vision_coefficient: float | None = None
    at: Mapping[str, float] = field(default_factory=dict)


def fit_record(law: AnyLaw, points: Points, *, options: Options) -> Record:
    """Fit the law and all that belongs to it; nothing is dropped that `options` do not say."""
    kept, excluded = drop_highest(points, count=options.drop_highest)
    split = None if options.holdout is None else holdout.by_rule(kept, rule=options.holdout)
    seen = kept if split is None else kept.select(~split.held_out)
    fit = _fit(law, seen, options=options)
    verdict, unseen = _holdout(law, kept, fit, split=split, options=options)
    record: Record = {
        "law": law.name,
        "points": len(seen),
        "objective": fit.objective,
        "parameters": dict(fit.parameters),
        **_allocation(fit, seen, options=options),
        "intervals": {},
        "metrics": fit.metrics(seen),
        "holdout": verdict,
        "starts": fit.starts.count,
        "agreement": {
            "at_best_fraction": fit.starts.at_best_fraction,
            "within_1_percent_fraction": fit.starts.within_1_percent_fraction,
            "confirmed": fit.starts.confirmed,
        },
        "gradient": fit.gradient,
        "has_floor": fit.has_floor(seen),
        "seconds": fit.seconds,
        "delta": fit.delta,
        "objective_is": "sum of Huber(log predicted - log measured)",
        "solver": fit.solver.value,
        "grid": options.grid,
        "excluded": excluded,
        "suspects": list(seen.select(fit.suspects(seen)).names),
        "ranges": ranges_of(seen),
    }
    if options.resamples:
        _add_intervals(record, fit, seen, options=options)
    if isinstance(law, MixtureLaw):
        record["domains"] = list(law.domains)
        record["best_shares"] = best_of_all({"loss": record}, weights={}, at=options.at)
    record["rows"] = _rows(kept, fit, unseen=unseen)
    return record


def ranges_of(points: Points) -> Record:
    """Least and greatest of every column and of the loss."""
    return {
        name: [float(column.min()), float(column.max())]
        for name, column in {**points.columns, "L": points.loss}.items()
    }


def _rows(points: Points, fit: Fit, *, unseen: np.ndarray) -> list[Record]:
    """A row of points.csv for every point that was not dropped."""
    columns = {**points.columns, "C": flops_of(points), "L": points.loss}
    columns |= {"predicted": fit.predict(points.columns), "predicted_unseen": unseen}
    return [
        {"point": name, **{key: float(values[place]) for key, values in columns.items()}}
        for place, name in enumerate(points.names)
    ]


def drop_highest(points: Points, *, count: int) -> tuple[Points, Record]:
    """The points without the `count` highest losses, and what was done, for the record."""
    if not 0 <= count < len(points):
        raise UserError(
            f"--drop-highest is {count} of {len(points)} points; give a number from 0 to "
            f"{len(points) - 1}."
        )
    order = np.argsort(-points.loss, kind="stable")
    kept = points.select(np.sort(order[count:]))
    dropped = points.select(np.sort(order[:count]))
    policy = f"the {count} highest losses" if count else "none"
    return kept, {"policy": policy, "points": list(dropped.names), "losses": dropped.loss.tolist()}


def _fit(law: AnyLaw, points: Points, *, options: Options) -> Fit:
    return fit_law(
        law, points, delta=options.delta, grid=GRIDS[options.grid], solver=options.solver
    )


def _allocation(fit: Fit, points: Points, *, options: Options) -> Record:
    """`exponents` by the closed form, `regression` by the paper's; empty for other laws."""
    if fit.law.name not in ("chinchilla", "mixture"):
        return {"exponents": {}, "regression": None, "tokens_per_parameter": None}
    found = exponents(fit.parameters, points)
    flops = flops_of(points)
    accounting = accounting_of(points)
    if options.vision_coefficient is not None:
        accounting = replace(accounting, saved=options.vision_coefficient)
    tokens = points.columns["D"]
    regression = allocation.regression(
        fit.parameters,
        flops=np.unique(flops),
        tokens=(float(tokens.min()), float(tokens.max())),
        accounting=accounting,
        spaced=options.spaced,
    )
    return {
        "exponents": {name: float(value) for name, value in found.items()},
        "regression": None if regression is None else asdict(regression),
        "tokens_per_parameter": _ratio(fit.parameters, accounting, found, regression, flops=flops),
        "accounting": asdict(accounting),
        "regression_tokens_spaced": options.spaced,
    }


def _ratio(
    parameters: Mapping[str, float],
    accounting: allocation.Accounting,
    closed: Mapping[str, np.ndarray | float],
    regression: allocation.Regression | None,
    *,
    flops: np.ndarray,
) -> Record:
    """D_opt / N_opt: its exponent in C both ways, and itself at the largest C of the data."""
    size, tokens = allocation.numeric_optimum(
        parameters, flops=flops[flops.argmax()][None], accounting=accounting
    )
    return {
        "exponent": float(closed["b"] - closed["a"]),
        "regression_exponent": None if regression is None else regression.b - regression.a,
        "flops": float(flops.max()),
        "at_flops": float(tokens[0] / size[0]),
    }


def exponents(
    parameters: Mapping[str, np.ndarray | float], points: Points
) -> dict[str, np.ndarray | float]:
    """a, b, d by the closed form and c along the law's frontier within the data's FLOPs."""
    found = allocation.closed_form(parameters)
    flops = flops_of(points)
    arrays = {name: np.asarray(value) for name, value in parameters.items()}
    ends = (float(flops.min()), float(flops.max()))
    c = allocation.frontier_exponent(arrays, flops=ends)
    return {"a": found["a"], "b": found["b"], "c": c, "d": found["d"]}


def accounting_of(points: Points) -> allocation.Accounting:
    """That of late fusion where runs have a vision encoder, else C = 6 N D."""
    columns = points.columns
    if "N_v" not in columns or "D_v" not in columns or not columns["N_v"].any():
        return allocation.Accounting()
    return allocation.late_fusion(
        size=columns["N"],
        vision=columns["N_v"],
        tokens=columns["D"],
        vision_tokens=columns["D_v"],
    )


def flops_of(points: Points) -> np.ndarray:
    """C where it was measured, else 6 N D."""
    columns = points.columns
    return columns["C"] if "C" in columns else 6 * columns["N"] * columns["D"]


def _holdout(
    law: AnyLaw, kept: Points, fit: Fit, *, split: holdout.Split | None, options: Options
) -> tuple[Record | None, np.ndarray]:
    """By the rule that was asked for; else the largest sizes, predicted by a fit without them.

    The second value holds the prediction of each held-out point, and no number for the others.
    """
    predicted = np.full(len(kept), np.nan)
    if split is None:
        split = holdout.largest(kept)
        if split is None or (~split.held_out).sum() < len(law.names):
            return None, predicted
        fit = _fit(law, kept.select(~split.held_out), options=options)
    unseen = fit.predict(kept.select(split.held_out).columns)
    predicted[split.held_out] = unseen
    return holdout.verdict(unseen, points=kept, split=split), predicted


def _add_intervals(record: Record, fit: Fit, points: Points, *, options: Options) -> None:
    theta = bootstrap(fit, points, resamples=options.resamples, seed=options.seed)
    values: dict[str, Any] = fit.law.natural(theta)
    if record["exponents"]:
        values = {**values, **exponents(values, points)}
    record["intervals"] = intervals(values)
    record["bootstrap"] = {
        "resamples": options.resamples,
        "seed": options.seed,
        "mean": {name: float(np.mean(value)) for name, value in values.items()},
        "std": {name: float(np.std(value)) for name, value in values.items()},
        "parameters": {name: values[name].tolist() for name in fit.law.names},
    }
