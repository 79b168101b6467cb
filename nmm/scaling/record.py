"""What `fit` writes down: a law, its evidence and what follows from it, as one JSON object."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nmm.errors import UserError
from nmm.scaling import allocation, holdout
from nmm.scaling.bootstrap import bootstrap, intervals
from nmm.scaling.files import Record
from nmm.scaling.fit import DELTA, AnyLaw, Fit, Solver, fit_law
from nmm.scaling.laws import EPOCH_GRID, NMM_GRID
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
        **_allocation(fit, seen),
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
        "seconds": fit.seconds,
        "delta": fit.delta,
        "objective_is": "sum of Huber(log predicted - log measured)",
        "solver": fit.solver.value,
        "grid": options.grid,
        "excluded": excluded,
        "suspects": list(seen.select(fit.suspects(seen)).names),
        "ranges": {
            name: [float(column.min()), float(column.max())]
            for name, column in {**seen.columns, "L": seen.loss}.items()
        },
    }
    if options.resamples:
        _add_intervals(record, fit, seen, options=options)
    record["rows"] = _rows(kept, fit, unseen=unseen)
    return record


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


def _allocation(fit: Fit, points: Points) -> Record:
    """`exponents` by the closed form, `regression` by the paper's; empty for other laws."""
    if fit.law.name not in ("chinchilla", "mixture"):
        return {"exponents": {}, "regression": None}
    found = exponents(fit.parameters, points)
    flops = flops_of(points)
    accounting = accounting_of(points)
    tokens = points.columns["D"]
    regression = allocation.regression(
        fit.parameters,
        flops=np.unique(flops),
        tokens=(float(tokens.min()), float(tokens.max())),
        accounting=accounting,
    )
    return {
        "exponents": {name: float(value) for name, value in found.items()},
        "regression": None if regression is None else asdict(regression),
        "accounting": asdict(accounting),
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


def table(record: Record, *, title: str) -> str:
    """For people."""
    lines = [title, f"{record['law']} law, {record['points']} points, delta {record['delta']:g}"]
    spread = record["intervals"]
    for name, value in {**record["parameters"], **record["exponents"]}.items():
        low_high = f"   [{spread[name][0]:.6g}, {spread[name][1]:.6g}]" if name in spread else ""
        lines.append(f"  {name:<12}{value:>14.7g}{low_high}")
    agreement = record["agreement"]
    lines.append(
        f"objective {record['objective']:.10e} (sum of Huber), found by "
        f"{agreement['at_best_fraction']:.1%} of {record['starts']:,} starts, largest derivative "
        f"{record['gradient']:.0e}, {record['seconds']:.2f} s"
    )
    if not agreement["confirmed"]:
        lines.append("NOT CONFIRMED: hardly any other start ended at this minimum")
    lines += [*_metrics_lines(record), *_regression_lines(record), *_doubts(record)]
    return "\n".join(lines)


def _metrics_lines(record: Record) -> list[str]:
    lines = ["                MSE        R2     MAE %"]
    rows = [("fitted", record["metrics"])]
    if record["holdout"]:
        rows += [("held out", record["holdout"]["metrics"])]
        rows += [("by a ruler", record["holdout"]["naive_metrics"])]
    for name, found in rows:
        r2 = "-" if found["r2"] is None else f"{found['r2']:.4f}"
        lines.append(f"{name:<11}{found['mse']:>9.2e} {r2:>9} {found['mae_percent']:>9.4f}")
    if record["holdout"]:
        lines.append(
            f"held out: the {record['holdout']['points']} points with {record['holdout']['rule']}, "
            f"predicted from the other {record['holdout']['fitted_points']}"
        )
    return lines


def _regression_lines(record: Record) -> list[str]:
    found = record["regression"]
    if found is None:
        return []
    return [
        f"exponents by the paper's regression: a {found['a']:.4f}  b {found['b']:.4f}  "
        f"d {found['d']:.4f} ({found['points']} C, {found['edge']} left out at an end of the D)"
    ]


def _doubts(record: Record) -> list[str]:
    lines = []
    for name in _LISTED:
        if names := _names(record, name):
            lines.append(f"{_LISTED[name]}: {', '.join(names[:10])}{' ..' * (len(names) > 10)}")
    return lines


_LISTED = {"excluded": "left out by --drop-highest", "suspects": "far from the law, and kept"}


def _names(record: Record, key: str) -> Sequence[str]:
    return record[key]["points"] if key == "excluded" else record[key]
