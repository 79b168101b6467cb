"""A law of `nmm/scaling/laws.py` on data: the objective with exact first and second derivatives.

    objective = sum_i weight_i Huber_delta(r_i)      r_i = log(predicted_i) - log(L_i)

The sum, not the mean (arXiv 2404.10102 shows what a mean with a fixed tolerance does). Everything
is float64. Logs of the columns are centred, so that coefficients are values in the middle of the
data and barely correlate with exponents.

Letters: S searches, n points, p parameters, Q problems (data sets on the same design).
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from nmm.scaling import valleys
from nmm.scaling.laws import Law
from nmm.scaling.solve import Slopes

SMALLEST_SHARE = 1e-3  # of the middle prediction that a term has when a search begins
SMALLEST_EXPONENT = (
    0.02  # in size, when a search begins: at 0 a term cannot be told from the constant
)


class PowerModel:
    """The objective of Q problems that share their columns; see `nmm.scaling.solve.Model`.

    `loss` is [Q, n] or [n]; `weights` (how often a point counts) and `offset` (added to the
    prediction, nats) are [Q, n], [n] or None.
    """

    iterations = 60  # most searches end within 20, 97 % within 35; the rest creep for hundreds

    def __init__(
        self,
        law: Law,
        *,
        columns: Mapping[str, np.ndarray],
        loss: np.ndarray,
        delta: float,
        weights: np.ndarray | None = None,
        offset: np.ndarray | None = None,
    ) -> None:
        self.law, self.delta = law, delta
        self.log_loss = np.atleast_2d(np.log(loss))
        self.weights = None if weights is None else np.atleast_2d(weights)
        self.offset = None if offset is None else np.atleast_2d(offset)
        logs = {name: np.log(columns[name]) for name in law.columns}
        self._centre = {name: float(log.mean()) for name, log in logs.items()}
        # Derivatives of the log of each term, [1, -x_1, ..], and the products of any two.
        ones = np.ones(self.points)
        self._basis = [
            np.stack([ones, *(self._centre[c] - logs[c] for _, c in term.powers)])
            for term in law.terms
        ]
        self._products = _products([ones[None], *self._basis])
        starts = np.cumsum([1, *(len(basis) for basis in self._basis)])
        self._places = [slice(*ends) for ends in pairwise(starts.tolist())]

    @property
    def points(self) -> int:
        return self.log_loss.shape[1]

    @property
    def positive_constant(self) -> bool:
        return self.law.sign > 0

    def centred(self, theta: np.ndarray) -> np.ndarray:
        """The law's theta[S, p] with coefficients in the middle of the data."""
        return self._shifted(theta, sign=-1)

    def uncentred(self, theta: np.ndarray) -> np.ndarray:
        """The inverse of `centred`."""
        return self._shifted(theta, sign=1)

    def _shifted(self, theta: np.ndarray, *, sign: int) -> np.ndarray:
        theta = np.array(theta, dtype=float)
        for term, places in zip(self.law.terms, self._places, strict=True):
            for step, (_, column) in enumerate(term.powers, start=1):
                theta[..., places.start] += (
                    sign * self._centre[column] * theta[..., places.start + step]
                )
        return theta

    def evaluate(self, theta: np.ndarray, *, problems: np.ndarray, exact: bool) -> Slopes:
        """Objective [S], gradient [S, p] and curvature [S, p, p] at centred theta[S, p].

        The curvature is the Hessian if `exact`, else the positive one of reweighted least squares
        (weights Huber'(r)/r), which bounds the objective from above near theta.
        """
        terms, inverse, residual = self._terms(theta, problems=problems)
        slope = np.clip(residual, -self.delta, self.delta)
        losses = slope * (residual - 0.5 * slope)
        if exact:
            bend = (np.abs(residual) <= self.delta) - slope
        else:
            bend = np.divide(slope, residual, out=np.ones_like(slope), where=residual != 0)
        if self.weights is not None:
            weights = _of(self.weights, problems)
            losses, slope, bend = losses * weights, slope * weights, bend * weights
        shares = [term * inverse for term in terms]
        sloped = [slope * share for share in shares]
        gradient = np.empty_like(theta)
        gradient[:, 0] = np.einsum("sn,sn->s", slope, inverse)
        for values, basis, places in zip(sloped, self._basis, self._places, strict=True):
            gradient[:, places] = values @ basis.T
        curvature = self._curvature(bend, shares=[inverse, *shares])
        if exact:
            for k, (values, places) in enumerate(zip(sloped, self._places, strict=True), start=1):
                curvature[:, places, places] += _moments(values, self._products[k, k])
        return Slopes(losses.sum(1), gradient, curvature)

    def losses(self, theta: np.ndarray) -> np.ndarray:
        """Huber of every point, unweighted: [S, n] of the first problem, at centred theta[S, p]."""
        _, _, residual = self._terms(theta, problems=np.zeros(len(theta), dtype=int))
        slope = np.clip(residual, -self.delta, self.delta)
        return slope * (residual - 0.5 * slope)

    def _terms(
        self, theta: np.ndarray, *, problems: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The terms [S, n] each, 1 / prediction and the residual of the log, [S, n]."""
        bases = zip(self._basis, self._places, strict=True)
        terms = [np.exp(theta[:, places] @ basis) for basis, places in bases]
        total = sum(terms, start=theta[:, :1])
        if self.offset is not None:
            total = total + _of(self.offset, problems)
        return terms, 1 / total, np.log(total) - _of(self.log_loss, problems)

    def _curvature(self, bend: np.ndarray, *, shares: list[np.ndarray]) -> np.ndarray:
        """sum_i bend_i J_i J_i^T for the derivatives J of the log prediction; [S, p, p]."""
        curvature = np.empty((len(bend), len(self.law.names), len(self.law.names)))
        places = [slice(0, 1), *self._places]
        for k, share in enumerate(shares):
            bent = bend * share
            for m in range(k, len(shares)):
                block = _moments(bent * shares[m], self._products[k, m])
                curvature[:, places[k], places[m]] = block
                curvature[:, places[m], places[k]] = block.transpose(0, 2, 1)
        return curvature

    def begin(self, theta: np.ndarray) -> np.ndarray:
        """Centred starts with the scale and the size of terms that any search must have.

        All terms are scaled by one factor (to the median of the data), vanished ones come back to
        `SMALLEST_SHARE`, and exponents of 0 become `SMALLEST_EXPONENT`.
        """
        theta = self._scaled(theta)
        for places in self._places:
            exponents = theta[:, places.start + 1 : places.stop]
            small = np.abs(exponents) < SMALLEST_EXPONENT
            exponents[small] = np.copysign(SMALLEST_EXPONENT, exponents[small])
        middle = np.exp(np.median(self.log_loss))
        if self.law.sign > 0:
            theta[:, 0] = np.maximum(theta[:, 0], SMALLEST_SHARE * middle)
        for places in self._places:
            floor = np.log(SMALLEST_SHARE * middle)
            theta[:, places.start] = np.maximum(theta[:, places.start], floor)
        return self._scaled(theta)

    def _scaled(self, theta: np.ndarray) -> np.ndarray:
        """Laws without offset: all terms times the factor that puts the median residual at 0."""
        theta = np.array(theta, dtype=float)
        if self.law.sign < 0:
            return theta
        _, _, residual = self._terms(theta, problems=np.zeros(len(theta), dtype=int))
        shift = -np.median(residual, axis=1)
        theta[:, 0] *= np.exp(shift)
        for places in self._places:
            theta[:, places.start] += shift
        return theta

    def straighten(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return valleys.straighten(theta, firsts=[places.start for places in self._places])

    def bend(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        firsts = [places.start for places in self._places]
        return valleys.bend(flat, firsts=firsts, positive_constant=self.law.sign > 0)


def _of(values: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """The row of each search's problem; one row serves all."""
    return values if len(values) == 1 else values[problems]


def _products(bases: list[np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """For each pair k <= m the products [n, a, b] of their rows."""
    return {
        (k, m): np.ascontiguousarray(np.einsum("an,bn->nab", bases[k], bases[m]))
        for k in range(len(bases))
        for m in range(k, len(bases))
    }


def _moments(values: np.ndarray, products: np.ndarray) -> np.ndarray:
    """sum_i values[s, i] products[i, a, b] -> [S, a, b]."""
    points, *sizes = products.shape
    return (values @ products.reshape(points, -1)).reshape(-1, *sizes)
