"""Intervals of the frontier, whose hull noise does not only move but lowers.

Drawing runs with replacement would lift that hull. So every size gets a smooth curve, what is left
of its runs is drawn again and put on the curves, and the frontier of such copies is compared with
that of the curves: their mean difference is the bias, which the interval takes off. The bias is
estimated from curves that are noisy themselves. How much the corrected value varies follows from
copies of copies (a double bootstrap): with x = copy + its curves and two further copies y, z of
these curves, the covariance of x - y and x - z over all copies is the variance of x minus the mean
of infinitely many y.
"""

import numpy as np

from nmm.scaling.frontier import Line, line_of

RUNS_PER_DEGREE = 3  # a curve bends once for every so many runs, three times at most
LARGEST_DEGREE = 3
NORMAL = 1.959964  # standard deviations on either side of a mean that hold 95 %


def frontier_intervals(
    found: Line,
    *,
    flops: np.ndarray,
    loss: np.ndarray,
    size: np.ndarray,
    least_flops: float,
    resamples: int,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of `k`, `c` and, where parabolas tell it, `isoflop_a`; arrays are [n].

    Empty where no size has enough runs to tell noise from a curve.
    """
    curves, noise = smooth_curves(flops, loss=loss, size=size)
    if len(noise) == 0 or resamples < 2:
        return {}
    rng = np.random.default_rng(seed)

    def numbers(log_loss: np.ndarray) -> np.ndarray:
        return _numbers(
            line_of(flops=flops, loss=np.exp(log_loss), size=size, least_flops=least_flops)
        )

    def noisy(smooth: np.ndarray) -> np.ndarray:
        return smooth + rng.choice(noise, size=len(smooth))

    still, copies, sums, firsts, seconds = numbers(curves), [], [], [], []
    for _ in range(resamples):
        copy = noisy(curves)
        again, _ = smooth_curves(flops, loss=np.exp(copy), size=size)
        copies.append(numbers(copy))
        sums.append(copies[-1] + numbers(again))
        firsts.append(numbers(noisy(again)))
        seconds.append(numbers(noisy(again)))
    bias = np.mean(copies, axis=0) - still
    first, second = np.subtract(sums, firsts), np.subtract(sums, seconds)
    covariance = ((first - first.mean(0)) * (second - second.mean(0))).mean(0)
    spread = np.sqrt(np.maximum(covariance, np.var(copies, axis=0)))
    middle = _numbers(found) - bias
    return _intervals(middle - NORMAL * spread, middle + NORMAL * spread)


def _numbers(line: Line) -> np.ndarray:
    """log k, c and a of a line; no number for an a that it does not tell."""
    a = np.nan if line.isoflop_a is None else line.isoflop_a
    return np.array([np.log(line.k), line.c, a])


def _intervals(low: np.ndarray, high: np.ndarray) -> dict[str, tuple[float, float]]:
    ends = np.array([low, high]).T
    ends[0] = np.exp(ends[0])
    return {
        name: (float(pair[0]), float(pair[1]))
        for name, pair in zip(("k", "c", "isoflop_a"), ends, strict=True)
        if np.isfinite(pair).all()
    }


def smooth_curves(
    flops: np.ndarray, *, loss: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(log loss [n] on the curve of each size, what is left of the runs, widened for the fit).

    A curve is a polynomial of the log loss in log C. Sizes with too few runs for one keep their
    losses and tell nothing of the noise.
    """
    smooth, left = np.log(loss), [np.empty(0)]
    for one in np.unique(size):
        here = np.flatnonzero(size == one)
        degree = min(LARGEST_DEGREE, len(here) // RUNS_PER_DEGREE)
        free = len(here) - degree - 1
        if degree == 0 or free == 0:
            continue
        x = np.log(flops[here])
        powers = np.vander((x - x.mean()) / max(float(np.ptp(x)), 1e-12), degree + 1)
        curve = powers @ np.linalg.lstsq(powers, smooth[here], rcond=None)[0]
        left.append((smooth[here] - curve) * np.sqrt(len(here) / free))
        smooth[here] = curve
    return smooth, np.concatenate(left)
