"""Laws that are no sums of powers, on data: the objective by the derivatives of the loss.

The objective is that of `nmm/scaling/powers.py`. The curvature is always the one of reweighted
least squares.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from nmm.scaling import valleys
from nmm.scaling.solve import Slopes


class SmoothLaw(Protocol):
    """A law whose vector theta[p] begins (constant, log term, exponent, log term, exponent, ..).

    `terms` is how many such terms there are. `loss` returns the predicted losses [S, n] and their
    derivatives [S, p, n].
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def terms(self) -> int: ...

    def loss(
        self, theta: np.ndarray, *, columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]: ...


class SmoothModel:
    """The objective of Q problems that share their columns; see `nmm.scaling.solve.Model`.

    `loss` is [Q, n] or [n]; `weights` (how often a point counts) [Q, n], [n] or None.
    """

    iterations = 300  # without a Hessian the last digits take long
    positive_constant = True

    def __init__(
        self,
        law: SmoothLaw,
        *,
        columns: Mapping[str, np.ndarray],
        loss: np.ndarray,
        delta: float,
        weights: np.ndarray | None = None,
    ) -> None:
        self.law, self.columns, self.delta = law, columns, delta
        self.log_loss = np.atleast_2d(np.log(loss))
        self.weights = None if weights is None else np.atleast_2d(weights)
        self._firsts = range(1, 1 + 2 * law.terms, 2)

    @property
    def points(self) -> int:
        """Of memory: each point takes a value for every parameter."""
        return self.log_loss.shape[1] * len(self.law.names)

    def centred(self, theta: np.ndarray) -> np.ndarray:
        """These laws take their coefficients in the middle of common sizes: nothing to do."""
        return np.array(theta, dtype=float)

    uncentred = begin = centred

    def evaluate(self, theta: np.ndarray, *, problems: np.ndarray, exact: bool) -> Slopes:
        """Objective [S], gradient [S, p] and curvature [S, p, p] at theta[S, p]."""
        del exact  # there are no second derivatives
        loss, derivatives = self.law.loss(theta, columns=self.columns)
        residual = np.log(loss) - _of(self.log_loss, problems)
        slope = np.clip(residual, -self.delta, self.delta)
        losses = slope * (residual - 0.5 * slope)
        bend = np.divide(slope, residual, out=np.ones_like(slope), where=residual != 0)
        if self.weights is not None:
            weights = _of(self.weights, problems)
            losses, slope, bend = losses * weights, slope * weights, bend * weights
        logs = derivatives / loss[:, None]
        gradient = (logs @ slope[:, :, None])[:, :, 0]
        return Slopes(losses.sum(1), gradient, (logs * bend[:, None]) @ logs.transpose(0, 2, 1))

    def losses(self, theta: np.ndarray) -> np.ndarray:
        """Huber of every point, unweighted: [S, n] of the first problem, at theta[S, p]."""
        loss, _ = self.law.loss(theta, columns=self.columns)
        residual = np.log(loss) - self.log_loss[:1]
        slope = np.clip(residual, -self.delta, self.delta)
        return slope * (residual - 0.5 * slope)

    def straighten(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return valleys.straighten(theta, firsts=self._firsts)

    def bend(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return valleys.bend(flat, firsts=self._firsts, positive_constant=True)


def _of(values: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """The row of each search's problem; one row serves all."""
    return values if len(values) == 1 else values[problems]
