"""Laws of two modalities in one model (arXiv 2301.03728): competition, synergy, and the barrier.

    alone      L(N, D_j) = E_j + A_j / N^alpha_j + B_j / D_j^beta_j
    together   L(N, D_i, D_j) = [L(N, D_i) + L(N, D_j)] / 2 - C + A / N^alpha + B / D^beta

with D = D_i + D_j, and the loss of a pair the mean over the two modalities. C is the synergy that
remains in the limit, A and B are competition for capacity and for updates. The **barrier** is where
the two cancel: C = A / N^alpha + B / D^beta. Its cheapest point by 6 N D follows in closed form:

    A N^-alpha = C beta / (alpha + beta)      B D^-beta = C alpha / (alpha + beta)

The laws alone are fitted first and kept; the five numbers of the interaction are then fitted to the
log of the joint loss, not to the difference, which may be negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nmm.scaling.bootstrap import refit, resample
from nmm.scaling.fit import DELTA, Fit, Solver, Starts, check, fit_law, model_of
from nmm.scaling.laws import CHINCHILLA, INTERACTION, INTERACTION_PRODUCT, NMM_GRID, Grid, Law
from nmm.scaling.points import Points
from nmm.scaling.powers import PowerModel
from nmm.scaling.reference import minimise_lbfgs
from nmm.scaling.solve import DONE_RESAMPLED, minimise

Numbers = Mapping[str, float] | Mapping[str, np.ndarray]

STARTS = {"terms": (0.003, 0.03, 0.3), "exponents": (0.1, 0.3, 0.7)}  # nats in the middle; powers


@dataclass(frozen=True)
class Interaction:
    """The five numbers of a pair, and the resamples of them when asked for."""

    law: Law
    parameters: Mapping[str, float]
    theta: np.ndarray
    objective: float
    gradient: float  # the largest derivative left
    starts: Starts


@dataclass(frozen=True)
class Pair:
    """Both laws alone and what comes on top; `product` is the misprinted form, for comparison.

    `resampled` holds theta[R, p] of the interaction, with all three tables resampled.
    """

    alone: tuple[Fit, Fit]
    together: Interaction
    product: Interaction
    resampled: np.ndarray

    def predict(self, together: Points) -> np.ndarray:
        """The joint loss at points with N, D_i and D_j."""
        first, second = self.alone
        offset = mean_alone((first.parameters, second.parameters), together)
        columns = joint_points(together).columns
        return INTERACTION.predict(self.together.parameters, columns=columns, offset=offset)


@dataclass(frozen=True)
class Barrier:
    """The cheapest size and number of tokens (of both modalities) at which a pair gains."""

    size: float
    tokens: float

    @property
    def flops(self) -> float:
        return 6 * self.size * self.tokens


def barrier(parameters: Mapping[str, float]) -> Barrier | None:
    """The cheapest point of the barrier; None where C <= 0: no synergy at any scale, or at one that
    is no number, as of a resample that knows no exponent.
    """
    p = parameters
    if p["C"] <= 0:
        return None
    both = p["alpha"] + p["beta"]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        size = np.float64(p["A"] * both / (p["beta"] * p["C"])) ** (1 / np.float64(p["alpha"]))
        tokens = np.float64(p["B"] * both / (p["alpha"] * p["C"])) ** (1 / np.float64(p["beta"]))
    found = Barrier(size=float(size), tokens=float(tokens))
    return found if np.isfinite(found.flops) else None


def fit_pair(
    alone: tuple[Points, Points],
    together: Points,
    *,
    delta: float = DELTA,
    grid: Grid = NMM_GRID,
    solver: Solver = Solver.batched,
    resamples: int = 0,
    seed: int = 0,
) -> Pair:
    """Fit a pair: `alone` have N and D; `together` N, D_i, D_j and the two's mean loss."""
    first, second = (
        fit_law(CHINCHILLA, points, delta=delta, grid=grid, solver=solver) for points in alone
    )
    fits = (first, second)
    offset = mean_alone((fits[0].parameters, fits[1].parameters), together)
    joint = joint_points(together)
    found = _interaction(INTERACTION, joint, offset=offset, delta=delta, solver=solver)
    product = _interaction(INTERACTION_PRODUCT, joint, offset=offset, delta=delta, solver=solver)
    resampled = np.empty((0, len(INTERACTION.names)))
    if resamples:
        resampled = _resample(fits, alone, together, found, resamples=resamples, seed=seed)
    return Pair(fits, found, product, resampled)


def mean_alone(laws: tuple[Numbers, Numbers], points: Points) -> np.ndarray:
    """The mean loss of two models, each trained on one modality's tokens alone."""
    losses = []
    for law, tokens in zip(laws, ("D_i", "D_j"), strict=True):
        columns = {"N": points.columns["N"], "D": points.columns[tokens]}
        losses.append(CHINCHILLA.predict(law, columns=columns))
    return (losses[0] + losses[1]) / 2


def joint_points(together: Points) -> Points:
    """The same points by N and the tokens of both modalities."""
    columns = together.columns
    tokens = columns["D_i"] + columns["D_j"]
    return Points({"N": columns["N"], "D": tokens}, together.loss, together.names)


def _interaction(
    law: Law, points: Points, *, offset: np.ndarray, delta: float, solver: Solver
) -> Interaction:
    check(law, points)
    model = PowerModel(law, columns=points.columns, loss=points.loss, delta=delta, offset=offset)
    starts = _starts(law, gap=float(np.median(points.loss - offset)))
    find = minimise if solver is Solver.batched else minimise_lbfgs
    ends = find(model, starts)
    best = int(np.nanargmin(ends.objective))
    theta = model.uncentred(ends.theta[best])
    return Interaction(
        law=law,
        parameters={name: float(value) for name, value in law.natural(theta).items()},
        theta=theta,
        objective=float(ends.objective[best]),
        gradient=float(np.abs(ends.gradient[best]).max()),
        starts=Starts.of(ends),
    )


def _starts(law: Law, *, gap: float) -> np.ndarray:
    """Centred starts: every size of the terms and every exponent, the constant closing the gap."""
    found = []
    choices = np.meshgrid(*[STARTS["terms"]] * 2, *[STARTS["exponents"]] * 2)
    for term_a, term_b, exponent_a, exponent_b in np.stack(choices, axis=-1).reshape(-1, 4):
        if len(law.terms) == 2:
            terms = [np.log(term_a), exponent_a, np.log(term_b), exponent_b]
            found.append([gap - term_a - term_b, *terms])
        else:
            found.append([gap - term_a, np.log(term_a), exponent_a, exponent_b])
    return np.unique(np.array(found), axis=0)


def _resample(
    fits: tuple[Fit, Fit],
    alone: tuple[Points, Points],
    together: Points,
    found: Interaction,
    *,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """theta[R, p] of the interaction: all three tables are resampled and fitted again."""
    laws = []
    for side, (fit, points) in enumerate(zip(fits, alone, strict=True), start=1):
        weights = resample(len(points), resamples=resamples, seed=3 * seed + side)
        model = model_of(fit.law, points, delta=fit.delta, weights=weights)
        starts = np.repeat(model.centred(fit.theta)[None], resamples, axis=0)
        theta = model.uncentred(refit(model, starts, problems=np.arange(resamples)).theta)
        natural = CHINCHILLA.natural(theta)
        laws.append({name: value[:, None] for name, value in natural.items()})
    joint = joint_points(together)
    model = PowerModel(
        INTERACTION,
        columns=joint.columns,
        loss=joint.loss,
        delta=fits[0].delta,
        weights=resample(len(joint), resamples=resamples, seed=3 * seed),
        offset=mean_alone((laws[0], laws[1]), together),
    )
    starts = np.repeat(model.centred(found.theta)[None], resamples, axis=0)
    ends = minimise(model, starts, problems=np.arange(resamples), done=DONE_RESAMPLED)
    return model.uncentred(ends.theta)


def is_distinct(*, loss_across: float, loss_own: float, sigma: float = 3.0) -> bool:
    """Are two sets two modalities (section 3.1)?

    `loss_across` is that of a model of the first set on the second, `loss_own` on the first, in
    nats per token: is the perplexity more than `sigma` times as high?

    One summary of the paper has sigma squared; the factor is an argument so that it is said.
    """
    return bool(loss_across - loss_own > np.log(sigma))
