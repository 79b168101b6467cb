"""Intervals by resampling: every resample is fitted again, all of them at once.

A search that starts at the fit of all points can end in a minimum that is not the lowest of its
resample. So every resample's end is tried on every other resample (one matrix product), and where
a stranger's parameters do better, the search goes on from there.
"""

from collections.abc import Mapping

import numpy as np

from nmm.scaling.fit import Fit, model_of
from nmm.scaling.floor import search
from nmm.scaling.points import Points
from nmm.scaling.powers import PowerModel
from nmm.scaling.smooth import SmoothModel
from nmm.scaling.solve import DONE_RESAMPLED, Ends

LEVEL = 0.95
BETTER = 1e-6  # relative gain that makes a stranger's parameters worth a search
ROUNDS = 3
CANDIDATES = 500  # tried at a time, to bound the memory


def resample(count: int, *, resamples: int, seed: int) -> np.ndarray:
    """float64[R, n]: how often each of n points is drawn, with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)


def bootstrap(fit: Fit, points: Points, *, resamples: int, seed: int = 0) -> np.ndarray:
    """theta[R, p] of the law, fitted to each of R resamples of the points."""
    weights = resample(len(points), resamples=resamples, seed=seed)
    model = model_of(fit.law, points, delta=fit.delta, weights=weights)
    starts = np.repeat(model.centred(fit.theta)[None], resamples, axis=0)
    ends = refit(model, starts, problems=np.arange(resamples))
    return model.uncentred(ends.theta)


def refit(model: PowerModel | SmoothModel, starts: np.ndarray, *, problems: np.ndarray) -> Ends:
    """Search for every resample from its start, then from the best end of the others."""
    assert model.weights is not None
    ends = search(model, starts, problems=problems, done=DONE_RESAMPLED)
    for _ in range(ROUNDS):
        theta, objective = _best_stranger(model, ends.theta, weights=model.weights[problems])
        improved = np.flatnonzero(objective < ends.objective * (1 - BETTER))
        if len(improved) == 0:
            break
        again = search(model, theta[improved], problems=problems[improved], done=DONE_RESAMPLED)
        for kept, new in zip(vars(ends).values(), vars(again).values(), strict=True):
            kept[improved] = new
    return ends


def _best_stranger(
    model: PowerModel | SmoothModel, theta: np.ndarray, *, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each resample the theta of all with the lowest objective on it, and that objective."""
    best = np.zeros(len(weights), dtype=int)
    lowest = np.full(len(weights), np.inf)
    for first in range(0, len(theta), CANDIDATES):
        objective = weights @ model.losses(theta[first : first + CANDIDATES]).T
        place = np.argmin(objective, axis=1)
        found = objective[np.arange(len(weights)), place]
        better = found < lowest
        best[better], lowest[better] = first + place[better], found[better]
    return theta[best], lowest


def intervals(values: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """The middle `LEVEL` of each quantity's resamples that have a number, by percentiles."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    ends = {name: np.nanquantile(resamples, tails) for name, resamples in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}
