"""What `fit-mixed` writes down: a pair's laws, the evidence for them, and the barrier."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from nmm.scaling import holdout
from nmm.scaling.bootstrap import intervals
from nmm.scaling.files import Record
from nmm.scaling.fit import DELTA, FAR, Fit, Solver, Starts
from nmm.scaling.laws import INTERACTION
from nmm.scaling.metrics import agreement
from nmm.scaling.mixed import Interaction, Pair, barrier, fit_pair, joint_points, mean_alone
from nmm.scaling.points import Points
from nmm.scaling.record import ranges_of

TOO_FEW = 5  # points of the interaction that a fit without the largest sizes needs at least


@dataclass(frozen=True)
class PairOptions:
    """How to fit a pair; the fields are the flags of `fit-mixed`."""

    delta: float = DELTA
    solver: Solver = Solver.batched
    resamples: int = 0
    seed: int = 0


def pair_record(
    alone: tuple[Points, Points], together: Points, *, options: PairOptions
) -> tuple[Record, list[Record]]:
    """The record, and a row for every point of the three tables."""
    pair = fit_pair(
        alone,
        together,
        delta=options.delta,
        solver=options.solver,
        resamples=options.resamples,
        seed=options.seed,
    )
    predicted = pair.predict(together)
    verdict, unseen = _holdout(alone, together, options=options)
    residual = np.abs(np.log(predicted / together.loss))
    far = residual > FAR * 1.4826 * max(float(np.median(residual)), 1e-12)
    record: Record = {
        "law": pair.together.law.name,
        "points": len(together),
        **_interaction(pair.together),
        "alone": [_alone(fit, points) for fit, points in zip(pair.alone, alone, strict=True)],
        "product_form": _interaction(pair.product),
        **_barrier(pair),
        "metrics": agreement(predicted, measured=together.loss),
        "holdout": verdict,
        "delta": options.delta,
        "objective_is": "sum of Huber(log predicted - log measured)",
        "solver": options.solver.value,
        "bootstrap": {"resamples": options.resamples, "seed": options.seed},
        "excluded": {"policy": "none", "points": []},
        "suspects": list(together.select(far).names),
        "ranges": ranges_of(together),
    }
    return record, _rows(pair, alone, together, predicted=predicted, unseen=unseen)


def _interaction(found: Interaction) -> Record:
    return {
        "parameters": dict(found.parameters),
        "objective": found.objective,
        "gradient": found.gradient,
        **_starts(found.starts),
    }


def _alone(fit: Fit, points: Points) -> Record:
    return {
        "points": len(points),
        "parameters": dict(fit.parameters),
        "objective": fit.objective,
        "gradient": fit.gradient,
        "has_floor": fit.has_floor(points),
        **_starts(fit.starts),
        "metrics": fit.metrics(points),
        "suspects": list(points.select(fit.suspects(points)).names),
        "ranges": ranges_of(points),
    }


def _starts(starts: Starts) -> Record:
    return {
        "starts": starts.count,
        "agreement": {
            "at_best_fraction": starts.at_best_fraction,
            "within_1_percent_fraction": starts.within_1_percent_fraction,
            "confirmed": starts.confirmed,
        },
    }


def _barrier(pair: Pair) -> Record:
    """The cheapest point of the barrier, and the intervals of all that was resampled."""
    cheapest = barrier(pair.together.parameters)
    record: Record = {
        "barrier": None if cheapest is None else asdict(cheapest) | {"flops": cheapest.flops},
        "tokens_are": "of both modalities together",
        "intervals": {},
        "barrier_intervals": {},
    }
    if len(pair.resampled):
        natural = INTERACTION.natural(pair.resampled)
        record["intervals"] = intervals(natural)
        record["synergy_fraction"] = float(np.mean(natural["C"] > 0))
        record["barrier_intervals"] = _barrier_intervals(natural)
    return record


def _barrier_intervals(natural: Mapping[str, np.ndarray]) -> Record:
    """Of size, tokens and FLOPs; empty where some resample in forty knows no synergy."""
    points = [
        barrier({name: float(values[place]) for name, values in natural.items()})
        for place in range(len(natural["C"]))
    ]
    known = [point for point in points if point is not None]
    if len(known) < 0.975 * len(points):
        return {}
    columns = {
        "size": np.array([point.size for point in known]),
        "tokens": np.array([point.tokens for point in known]),
        "flops": np.array([point.flops for point in known]),
    }
    return intervals(columns)


def _holdout(
    alone: tuple[Points, Points], together: Points, *, options: PairOptions
) -> tuple[Record | None, np.ndarray]:
    """The largest sizes with both modalities, predicted by a fit that saw them in no table."""
    unseen = np.full(len(together), np.nan)
    split = holdout.largest(together)
    if split is None or (~split.held_out).sum() < TOO_FEW:
        return None, unseen
    limit = together.columns["N"][split.held_out].min()
    smaller = tuple(points.select(points.columns["N"] < limit) for points in alone)
    if any(len(s) < TOO_FEW or np.ptp(s.columns["N"]) == 0 for s in smaller):
        return None, unseen
    fitted = together.select(~split.held_out)
    pair = fit_pair((smaller[0], smaller[1]), fitted, delta=options.delta, solver=options.solver)
    unseen[split.held_out] = pair.predict(together.select(split.held_out))
    found = holdout.verdict(unseen[split.held_out], points=joint_points(together), split=split)
    return found, unseen


def _rows(
    pair: Pair,
    alone: tuple[Points, Points],
    together: Points,
    *,
    predicted: np.ndarray,
    unseen: np.ndarray,
) -> list[Record]:
    rows: list[Record] = []
    for side, points, fit in zip("ij", alone, pair.alone, strict=True):
        tokens = {f"D_{other}": np.zeros(len(points)) for other in "ij"}
        tokens[f"D_{side}"] = points.columns["D"]
        columns = {"N": points.columns["N"], **tokens, "L": points.loss}
        columns["predicted"] = fit.predict(points.columns)
        rows += _table(points.names, what=f"{side} alone", columns=columns)
    first, second = pair.alone
    columns = {name: together.columns[name] for name in ("N", "D_i", "D_j")}
    columns |= {"L": together.loss, "predicted": predicted, "predicted_unseen": unseen}
    columns["mean_alone"] = mean_alone((first.parameters, second.parameters), together)
    return rows + _table(together.names, what="both", columns=columns)


def _table(names: tuple[str, ...], *, what: str, columns: Mapping[str, np.ndarray]) -> list[Record]:
    return [
        {
            "trained_on": what,
            "point": name,
            **{key: float(values[place]) for key, values in columns.items()},
        }
        for place, name in enumerate(names)
    ]
