"""One law fitted to points: the best of all starts, how many others confirm it, its metrics."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from nmm.errors import UserError
from nmm.scaling.floor import NOTHING, search
from nmm.scaling.laws import CHINCHILLA, NMM_GRID, Grid, Law
from nmm.scaling.metrics import agreement
from nmm.scaling.mixtures import MixtureLaw
from nmm.scaling.points import Points
from nmm.scaling.powers import PowerModel
from nmm.scaling.reference import minimise_lbfgs
from nmm.scaling.repeated import RepeatedLaw
from nmm.scaling.smooth import SmoothModel
from nmm.scaling.solve import Ends

DELTA = 1e-3  # of Huber, on the log of the loss: arXiv 2203.15556 and 2504.07951
SAME = 1e-6  # relative difference of two objectives below which they are the same minimum
CONFIRMING_FRACTION = 0.01  # of the starts that must end at the best objective
SAME_VALUE = 0.01  # relative range of a column below which it does not vary
FAR = 5.0  # times the usual residual (1.4826 median |r|) at which a point is named as suspect

AnyLaw = Law | MixtureLaw | RepeatedLaw


class Solver(Enum):
    """How the objective is minimised."""

    batched = "batched"
    lbfgs = "lbfgs"


@dataclass(frozen=True)
class Starts:
    """How the starts of a fit ended; a fit that few of them found is not to be trusted."""

    count: int
    at_best_fraction: float  # within SAME of the best objective
    within_1_percent_fraction: float

    @property
    def confirmed(self) -> bool:
        """Did others than the best end there?"""
        return self.at_best_fraction >= max(CONFIRMING_FRACTION, 1.5 / self.count)

    @classmethod
    def of(cls, ends: Ends) -> "Starts":
        lowest = np.nanmin(ends.objective)
        return cls(
            count=len(ends.objective),
            at_best_fraction=float(np.mean(ends.objective <= lowest * (1 + SAME))),
            within_1_percent_fraction=float(np.mean(ends.objective <= lowest * 1.01)),
        )


@dataclass(frozen=True)
class Fit:
    """A law's parameters by name, and the evidence for them."""

    law: AnyLaw
    delta: float
    parameters: Mapping[str, float]
    theta: np.ndarray  # the same as the law's vector
    objective: float
    gradient: float  # the largest derivative left, by log coefficients in the middle of the data
    starts: Starts
    solver: Solver
    seconds: float

    def predict(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.law.predict(self.parameters, columns=columns)

    def metrics(self, points: Points) -> dict[str, float | None]:
        return agreement(self.predict(points.columns), measured=points.loss)

    def has_floor(self, points: Points) -> bool:
        """Do the points tell of a loss that more of everything does not pass?"""
        constant = self.parameters.get("E")
        return constant is None or bool(constant >= NOTHING * points.loss.min())

    def suspects(self, points: Points) -> np.ndarray:
        """bool[n]: points so far from the law that somebody should look at their runs."""
        residual = np.abs(np.log(self.predict(points.columns) / points.loss))
        return residual > FAR * 1.4826 * max(np.median(residual), 1e-12)


def fit_law(
    law: AnyLaw,
    points: Points,
    *,
    delta: float = DELTA,
    grid: Grid = NMM_GRID,
    solver: Solver = Solver.batched,
) -> Fit:
    """The parameters with the lowest objective; raises UserError where points cannot tell them.

    Laws that are no sums of powers start around a fit of N and D alone, which uses the grid.
    """
    check(law, points)
    started = time.perf_counter()
    model = model_of(law, points, delta=delta)
    if isinstance(law, Law):
        starts = model.centred(grid.starts(law))
    else:
        starts = law.starts(fit_law(CHINCHILLA, points, delta=delta, grid=grid).parameters)
    if solver is Solver.batched:
        ends = search(model, model.begin(starts))
    else:
        ends = minimise_lbfgs(model, starts)
    best = int(np.nanargmin(ends.objective))
    theta = model.uncentred(ends.theta[best])
    return Fit(
        law=law,
        delta=delta,
        parameters={name: float(value) for name, value in law.natural(theta).items()},
        theta=theta,
        objective=float(ends.objective[best]),
        gradient=float(np.abs(ends.gradient[best]).max()),
        starts=Starts.of(ends),
        solver=solver,
        seconds=time.perf_counter() - started,
    )


def model_of(
    law: AnyLaw, points: Points, *, delta: float, weights: np.ndarray | None = None
) -> PowerModel | SmoothModel:
    """The objective of a law on points; `weights` [Q, n] make it one of Q resamples."""
    if isinstance(law, Law):
        return PowerModel(
            law, columns=points.columns, loss=points.loss, delta=delta, weights=weights
        )
    return SmoothModel(law, columns=points.columns, loss=points.loss, delta=delta, weights=weights)


def check(law: AnyLaw, points: Points) -> None:
    """Refuse points from which the law's parameters cannot follow."""
    if len(points) < len(law.names):
        raise UserError(
            f"there are {len(points)} points and the law {law.name} has {len(law.names)} "
            f"parameters ({', '.join(law.names)}); add runs, or drop fewer."
        )
    if isinstance(law, RepeatedLaw) and (points.columns["D"] <= points.columns["U"]).all():
        raise UserError(
            f"no point has more tokens D than unique tokens U, so nothing can be told of "
            f"repetition; fit the chinchilla law to these {len(points)} points."
        )
    for column in (name for name in law.columns if name != "U"):
        values = points.columns[column]
        if np.ptp(values) <= SAME_VALUE * np.abs(values).max():
            raise UserError(
                f"{column} is {values[0]:.3g} at all {len(points)} points, so nothing can be told "
                f"of its exponent; add runs with another {column}."
            )
