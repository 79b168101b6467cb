"""Numbers that answer a study's questions, each with an interval and where that comes from.

Runs of one size share their trunk, so their differences are not independent: they are averaged
first, and the interval is that of a mean over sizes (Student's t: few sizes give wide ones). What
follows from a law has the interval of the law's resamples, and none if hardly any search but the
best found that law.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from nmm.scaling.allocation import Accounting, numeric_optimum
from nmm.scaling.bootstrap import LEVEL, intervals
from nmm.scaling.files import Record, Written
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.phenomena import BestBatch, lowest_point

FEWEST_RESAMPLES = 20
FEWEST_SIZES = 3
UNCONFIRMED = "a law that hardly any search found"


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval (infinite where nothing is known), and `how`."""

    value: float
    low: float
    high: float
    how: str


def mean_of(groups: Mapping[str, Sequence[float]]) -> Estimate | None:
    """Of the means of the groups, one a size; None without any. One says nothing of the spread."""
    means = np.array([np.mean(values) for values in groups.values() if len(values)])
    if len(means) == 0:
        return None
    value, count = float(means.mean()), sum(map(len, groups.values()))
    if len(means) == 1:
        return Estimate(value, -math.inf, math.inf, f"{count} values of one size")
    error = float(means.std(ddof=1)) / math.sqrt(len(means))
    half = error * float(student.ppf((1 + LEVEL) / 2, len(means) - 1))
    how = f"{count} values, mean over {len(means)} sizes, Student's t"
    return Estimate(value, value - half, value + half, how)


def ratio_of(groups: Mapping[str, Sequence[float]]) -> Estimate | None:
    """The same for ratios: of their logarithms, and back."""
    logs = {name: [math.log(value) for value in values] for name, values in groups.items()}
    found = mean_of(logs)
    if found is None:
        return None
    low, high = (math.exp(min(end, 700)) for end in (found.low, found.high))
    return Estimate(math.exp(found.value), low, high, f"{found.how} on logarithms")


def frontier_gap(of: Written, against: Written, *, at_most: bool) -> Estimate | None:
    """Nats by which the first law is lower at its best split of the least or most FLOPs of both.

    None where the two have no FLOPs in common.
    """
    flops = [one.points["C"] for one in (of, against)]
    low, high = max(c.min() for c in flops), min(c.max() for c in flops)
    if low > high:
        return None
    spent = np.array([high if at_most else low])
    both = (of, against)
    best, other = (_best_loss(one.record["parameters"], one, flops=spent) for one in both)
    value = float(other[0] - best[0])
    beyond = not all(_is_split_among_runs(one, flops=spent) for one in both)
    how = f"laws at {spent[0]:.3g} FLOPs{', extrapolated to best splits' * beyond}"
    if not (is_confirmed(of.record) and is_confirmed(against.record)):
        return Estimate(value, -math.inf, math.inf, f"{how}, {UNCONFIRMED}")
    if min(len(one.resamples.get("E", ())) for one in (of, against)) < FEWEST_RESAMPLES:
        return Estimate(value, -math.inf, math.inf, f"{how}, without resamples")
    resampled = [_best_loss(one.resamples, one, flops=spent) for one in (of, against)]
    count = min(map(len, resampled))
    ends = intervals({"gap": resampled[1][:count] - resampled[0][:count]})["gap"]
    return Estimate(value, *ends, f"{how}, {count} resamples of each")


def is_confirmed(record: Record) -> bool:
    """Of a law, or of all laws of a pair."""
    parts = [record, *record.get("alone", ())]
    return all(part["agreement"]["confirmed"] for part in parts)


def _best_loss(
    parameters: Mapping[str, float] | Mapping[str, np.ndarray], one: Written, *, flops: np.ndarray
) -> np.ndarray:
    """float64[R] for R resamples, float64[1] for one set of parameters."""
    columns = {name: np.atleast_1d(value)[:, None] for name, value in parameters.items()}
    spent = np.broadcast_to(flops, (len(columns["E"]), 1))
    accounting = Accounting(**one.record["accounting"])
    size, tokens = numeric_optimum(columns, flops=spent, accounting=accounting)
    return CHINCHILLA.predict(columns, columns={"N": size, "D": tokens})[:, 0]


def _is_split_among_runs(one: Written, *, flops: np.ndarray) -> bool:
    """Do the best N and D lie between the least and the greatest of the runs?"""
    parameters, accounting = one.record["parameters"], Accounting(**one.record["accounting"])
    best = numeric_optimum(parameters, flops=flops, accounting=accounting)
    runs = (one.points["N"], one.points["D"])
    return all(r.min() <= x[0] <= r.max() for x, r in zip(best, runs, strict=True))


def exponent(one: Written, *, name: str) -> Estimate:
    """a or b of the closed form."""
    value = float(one.record["exponents"][name])
    return _with_interval(value, one.record, name=name)


def interaction(record: Record, gains: Mapping[str, Sequence[float]]) -> Estimate | None:
    """The mean of the gains of every size; the two laws alone count as exact."""
    found = mean_of(gains)
    if found is None or is_confirmed(record):
        return found
    return Estimate(found.value, -math.inf, math.inf, UNCONFIRMED)


def of_interaction(record: Record, *, name: str) -> Estimate:
    """A parameter of what `fit-mixed` wrote."""
    return _with_interval(float(record["parameters"][name]), record, name=name)


def _with_interval(value: float, record: Record, *, name: str) -> Estimate:
    if not is_confirmed(record):
        return Estimate(value, -math.inf, math.inf, UNCONFIRMED)
    if name not in record["intervals"]:
        return Estimate(value, -math.inf, math.inf, f"{record['points']} points, no resamples")
    low, high = record["intervals"][name]
    how = f"resamples of {record['points']} points"
    return Estimate(value, _or(low, -math.inf), _or(high, math.inf), how)


def barrier_flops(record: Record) -> Estimate | None:
    """Of the barrier's cheapest point; infinite ends where too many resamples know no synergy."""
    if record["barrier"] is None:
        return None
    value = float(record["barrier"]["flops"])
    low, high = record["barrier_intervals"].get("flops", (0.0, math.inf))
    if not is_confirmed(record):
        return Estimate(value, 0.0, math.inf, UNCONFIRMED)
    share = record.get("synergy_fraction")
    how = "resamples" if share is None else f"resamples, of which {share:.0%} know synergy"
    return Estimate(value, _or(low, 0.0), _or(high, math.inf), how)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else float(value)


def prediction_error(one: Written) -> Estimate | None:
    """Percent by which the law misses points that its fit had not seen.

    None without such, and where that fit saw fewer than three sizes, which fix no exponent. Models
    of one size share their trunk and the law's error there: one size has no interval.
    """
    unseen = one.points["predicted_unseen"]
    there = np.isfinite(unseen)
    if not there.any() or len(np.unique(one.points["N"][~there])) < FEWEST_SIZES:
        return None
    errors = 100 * np.abs(unseen[there] / one.points["L"][there] - 1)
    groups: dict[str, list[float]] = {}
    for size, error in zip(one.points["N"][there], errors, strict=True):
        groups.setdefault(f"{size:g}", []).append(float(error))
    found = mean_of(groups)
    assert found is not None
    if not is_confirmed(one.record):
        return Estimate(found.value, 0.0, math.inf, UNCONFIRMED)
    return Estimate(found.value, max(0.0, found.low), found.high, found.how)


def layer_contrasts(scores: Sequence[float]) -> tuple[float, float] | None:
    """How far the first and the last layer's score are above the mean of those between."""
    if len(scores) < 3:
        return None
    middle = float(np.mean(scores[1:-1]))
    return scores[0] - middle, scores[-1] - middle


def best_batch(scan: BestBatch) -> Estimate | None:
    """Tokens a step; its ends are those of the parabolas that leave one batch out.

    None where the lowest point is outside of the batches that were tried.
    """
    if scan.best_tokens is None:
        return None
    logs, losses = np.log(scan.batches_tokens), np.array(scan.losses)
    without = [np.delete(np.arange(len(logs)), place) for place in range(len(logs))]
    others = [
        lowest_point(logs[kept], losses[kept]) for kept in without if len(np.unique(logs[kept])) > 2
    ]
    how = f"parabola through {len(logs)} batches, one left out in turn"
    if not others or None in others:
        return Estimate(scan.best_tokens, 0.0, math.inf, how)
    ends = [scan.best_tokens, *(one for one in others if one is not None)]
    return Estimate(scan.best_tokens, min(ends), max(ends), how)


def perplexity(nats: float) -> float:
    """exp, but finite: a model of one modality may find another impossible."""
    return math.exp(min(nats, 700))
