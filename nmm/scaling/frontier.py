"""The lowest losses at each compute: the frontier L = k C^c, and isoFLOP parabolas.

arXiv 2504.07951 (appendix C): runs of one size are joined to a curve of loss against FLOPs, the
lower convex hull of all curves is the frontier, the part below a least C is dropped, and a line is
fitted to the logarithms at linearly spaced C. IsoFLOP parabolas are approach 2 of arXiv 2203.15556;
they are biased when their losses lie far from the optimum (arXiv 2603.22339).
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nmm.errors import UserError

CURVE_POINTS = 50  # per stretch between two runs of one size
FITTED_POINTS = 1000
LEVELS = 8  # compute levels for isoFLOP parabolas read off the curves
SAME_FLOPS = 0.1  # runs within this relative distance of C are of one isoFLOP level


@dataclass(frozen=True)
class Frontier:
    """L = k C^c; `vertices` [m, 2] are C and loss along the hull."""

    k: float
    c: float
    least_flops: float
    vertices: np.ndarray

    def predict(self, flops: np.ndarray) -> np.ndarray:
        return self.k * flops**self.c


def frontier(*, flops: np.ndarray, loss: np.ndarray, least_flops: float = 0.0) -> Frontier:
    """The power law on the lower hull above `least_flops`; raises UserError if none is left.

    A power law is a straight line in the logarithms, and so are the curves between two runs of one
    size: the hull of the curves is the hull of their runs, whatever their sizes.
    """
    hull = lower_hull(np.log(np.stack([flops, loss], axis=1)))
    first = max(np.log(least_flops) if least_flops > 0 else -np.inf, hull[0, 0])
    if hull[-1, 0] - first < 1e-6:
        raise UserError(
            f"the frontier has no two points above {least_flops:g} FLOPs: its lowest losses lie "
            f"between {np.exp(hull[0, 0]):.3g} and {np.exp(hull[-1, 0]):.3g}; lower --min-flops."
        )
    spaced = np.linspace(np.exp(first), np.exp(hull[-1, 0]), FITTED_POINTS)
    heights = np.interp(np.log(spaced), hull[:, 0], hull[:, 1])
    slope, intercept = np.polyfit(np.log(spaced), heights, 1)
    return Frontier(float(np.exp(intercept)), float(slope), least_flops, np.exp(hull))


def _curve(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """log C and log loss [m, 2] of one size, straight between its runs."""
    order = np.argsort(flops)
    x, y = np.log(flops[order]), np.log(loss[order])
    steps = np.linspace(0, len(x) - 1, (len(x) - 1) * CURVE_POINTS + 1)
    return np.stack([np.interp(steps, np.arange(len(x)), values) for values in (x, y)], axis=1)


def lower_hull(points: np.ndarray) -> np.ndarray:
    """The vertices of points [n, 2] that a line from below can touch, and only while they fall.

    Andrew's monotone chain, cut after the lowest point: more compute with a higher loss is no
    frontier.
    """
    chain: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        while len(chain) > 1 and _turns_right(chain[-2], chain[-1], point):
            chain.pop()
        chain.append(point)
    hull = np.array(chain)
    return hull[: int(hull[:, 1].argmin()) + 1]


def _turns_right(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> bool:
    a, b = second - first, third - first
    return bool(a[0] * b[1] - a[1] * b[0] <= 0)


@dataclass(frozen=True)
class Parabola:
    """loss = a quadratic of log N at one C; the lowest point of it."""

    flops: float
    size: float
    loss: float
    points: int


def isoflop(
    *, flops: np.ndarray, loss: np.ndarray, size: np.ndarray
) -> tuple[list[Parabola], float | None]:
    """Parabolas of every level of C with three sizes or more, and `a` of N_opt ~ C^a.

    Parabolas that open downwards or whose lowest point lies outside of their sizes are left out;
    `a` is None with fewer than two left.
    """
    found = []
    for level in _levels(flops):
        x, y = np.log(size[level]), loss[level]
        if len(np.unique(x)) < 3:
            continue
        bend, slope, height = np.polyfit(x - x.mean(), y, 2)
        vertex = -slope / (2 * bend) if bend > 0 else np.inf
        if x.min() <= vertex + x.mean() <= x.max():
            lowest = height + slope * vertex / 2
            middle = float(np.exp(np.log(flops[level]).mean()))
            optimum = float(np.exp(vertex + x.mean()))
            found.append(Parabola(middle, optimum, float(lowest), len(x)))
    if len(found) < 2:
        return found, None
    logs = np.log([[parabola.flops, parabola.size] for parabola in found])
    return found, float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def _levels(flops: np.ndarray) -> list[np.ndarray]:
    """Places of the runs whose C agree: a gap of more than SAME_FLOPS begins another level."""
    order = np.argsort(flops)
    gaps = np.diff(np.log(flops[order])) > np.log1p(SAME_FLOPS)
    return np.split(order, np.flatnonzero(gaps) + 1)


def interpolated(
    *, flops: np.ndarray, loss: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C, loss, N) of every size's curve at common C, for designs without isoFLOP runs."""
    levels = np.geomspace(flops.min(), flops.max(), LEVELS + 2)[1:-1]
    found = []
    for one in np.unique(size):
        curve = _curve(flops[size == one], loss[size == one])
        inside = levels[(np.log(levels) >= curve[0, 0]) & (np.log(levels) <= curve[-1, 0])]
        heights = np.exp(np.interp(np.log(inside), curve[:, 0], curve[:, 1]))
        found += [(level, height, one) for level, height in zip(inside, heights, strict=True)]
    columns = np.array(found, dtype=float).reshape(-1, 3).T
    return columns[0], columns[1], columns[2]


@dataclass(frozen=True)
class Line:
    """The frontier with the parabolas of isoFLOP runs or, without such runs, of the curves."""

    frontier: Frontier
    parabolas: list[Parabola]
    isoflop_a: float | None
    read_off: bool

    @property
    def k(self) -> float:
        return self.frontier.k

    @property
    def c(self) -> float:
        return self.frontier.c


def line_of(
    *, flops: np.ndarray, loss: np.ndarray, size: np.ndarray, least_flops: float = 0.0
) -> Line:
    """Raises UserError like `frontier`."""
    line = frontier(flops=flops, loss=loss, least_flops=least_flops)
    parabolas, a = isoflop(flops=flops, loss=loss, size=size)
    read_off = a is None
    if read_off:
        levels = interpolated(flops=flops, loss=loss, size=size)
        parabolas, a = isoflop(flops=levels[0], loss=levels[1], size=levels[2])
    return Line(line, parabolas, a, read_off)


def line_record(found: Line) -> dict[str, Any]:
    """The frontier, its corners, and the parabolas."""
    line = found.frontier
    return {
        "k": line.k,
        "c": line.c,
        "min_flops": line.least_flops,
        "hull": line.vertices.tolist(),
        "isoflop": [asdict(parabola) for parabola in found.parabolas],
        "isoflop_a": found.isoflop_a,
        "isoflop_losses_are": "read off the curves of each size" if found.read_off else "of runs",
    }
