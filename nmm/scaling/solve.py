"""Many searches for a minimum at once: Levenberg and Marquardt's steps, Newton's near the end.

A search walks in coordinates that its model calls straight. Far away the curvature is that of
reweighted least squares, which is positive everywhere; once a step gains little, it is the exact
Hessian, whose steps end a search in a few. A step that is not downhill is taken back and the next
is shorter. Searches do not see each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

BLOCK_VALUES = 48_000  # floats in an array of a block: some of them fit the cache of a core
NEAR = 1e-2  # relative gain of a step below which the Hessian takes over
DONE = 1e-13  # relative gain, made or promised, below which a search has ended ..
DONE_RESAMPLED = 1e-9  # .. and where the spread of many ends is asked for, not each of them
SHORTEST = 1e9  # damping at which no step helps any more
SHRINK, SHRINKS = 0.4, 12


class Slopes(NamedTuple):
    """Objective [S], gradient [S, p], curvature [S, p, p]."""

    objective: np.ndarray
    gradient: np.ndarray
    curvature: np.ndarray


class Model(Protocol):
    """What is minimised; theta is [S, p], `problems` [S] says which data set a search is for."""

    iterations: int  # after which a search that has not ended is given up

    @property
    def points(self) -> int: ...

    def evaluate(self, theta: np.ndarray, *, problems: np.ndarray, exact: bool) -> Slopes: ...

    def straighten(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def bend(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass
class Ends:
    """Where the searches ended, all [S, ...]; `gradient` is that of the objective in theta."""

    theta: np.ndarray
    objective: np.ndarray
    gradient: np.ndarray
    iterations: np.ndarray


def minimise(
    model: Model, starts: np.ndarray, *, problems: np.ndarray | None = None, done: float = DONE
) -> Ends:
    """Follow every start[S, p] to where it can go down no further."""
    if problems is None:
        problems = np.zeros(len(starts), dtype=int)
    searches = _Searches(model, starts, problems=problems, done=done)
    with np.errstate(all="ignore"):  # too long a step overflows, and is taken back
        for _ in range(model.iterations):
            if not searches.step():
                break
    return Ends(
        searches.theta, searches.slopes.objective, searches.slopes.gradient, searches.iterations
    )


class _Searches:
    """The state of all searches."""

    def __init__(
        self, model: Model, starts: np.ndarray, *, problems: np.ndarray, done: float
    ) -> None:
        self._model, self._problems, self._done = model, problems, done
        count = len(starts)
        self.theta = np.array(starts, dtype=float)
        self.iterations = np.zeros(count, dtype=int)
        self._damping = np.full(count, 1e-2)
        self._near = np.zeros(count, dtype=bool)
        self._ended = np.zeros(count, dtype=bool)
        self._scale = np.ones_like(self.theta)  # of a step along each coordinate, Marquardt's
        self.slopes = self._evaluate(self.theta, here=np.arange(count))

    def step(self) -> bool:
        """One step of every search that has not ended; False when there is none."""
        here = np.flatnonzero(~self._ended)
        if len(here) == 0:
            return False
        self.iterations[here] += 1
        theta, promised = self._propose(here)
        tried = self._evaluate(theta, here=here)
        before = self.slopes.objective[here]
        gained = before - tried.objective
        taken = gained > 0  # not-a-number is no gain
        self.theta[here[taken]] = theta[taken]
        for kept, new in zip(self.slopes, tried, strict=True):
            kept[here[taken]] = new[taken]
        self._damping[here] *= np.where(taken, 0.2, 5.0)
        self._damping[here] = np.maximum(self._damping[here], 1e-9)
        self._ended[here] = (
            (self._near[here] & taken & (gained <= self._done * before))
            | (~taken & (promised <= self._done * before))
            | (self._damping[here] > SHORTEST)
        )
        self._near[here] |= taken & (gained < NEAR * before)
        return True

    def _propose(self, here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(theta to try, the decrease that a quadratic promises) for these searches."""
        flat, jacobian = self._model.straighten(self.theta[here])
        turned = jacobian.transpose(0, 2, 1)
        curvature = turned @ self.slopes.curvature[here] @ jacobian
        gradient = (turned @ self.slopes.gradient[here][:, :, None])[:, :, 0]
        diagonal = np.einsum("sii->si", curvature)
        fresh = ~self._near[here]  # the Hessian's diagonal may be negative: keep the last scale
        largest = np.maximum(diagonal.max(1, keepdims=True), 1e-300)
        scale = 1 / np.sqrt(np.maximum(diagonal, 1e-10 * largest))
        self._scale[here[fresh]] = scale[fresh]
        scale = self._scale[here]
        curvature *= scale[:, :, None] * scale[:, None, :]
        gradient *= scale
        direction = descend(curvature, gradient, damping=self._damping[here])
        bent = np.einsum("si,sij,sj->s", direction, curvature, direction)
        promised = -np.einsum("si,si->s", gradient, direction) - 0.5 * bent
        return self._feasible(flat, step=direction * scale), promised

    def _feasible(self, flat: np.ndarray, *, step: np.ndarray) -> np.ndarray:
        """theta after the step, shortened until it exists; not a number where it never does."""
        theta, exists = self._model.bend(flat + step)
        for _ in range(SHRINKS):
            if exists.all():
                break
            lost = np.flatnonzero(~exists)
            step[lost] *= SHRINK
            theta[lost], exists[lost] = self._model.bend(flat[lost] + step[lost])
        theta[~exists] = np.nan
        return theta

    def _evaluate(self, theta: np.ndarray, *, here: np.ndarray) -> Slopes:
        """Block by block, for the cache; searches near their end by the Hessian."""
        count, size = theta.shape
        slopes = Slopes(np.empty(count), np.empty((count, size)), np.empty((count, size, size)))
        for rows, exact in self._blocks(here):
            found = self._model.evaluate(
                theta[rows], problems=self._problems[here[rows]], exact=exact
            )
            for whole, new in zip(slopes, found, strict=True):
                whole[rows] = new
        return slopes

    def _blocks(self, here: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
        rows = max(1, BLOCK_VALUES // self._model.points)
        for exact in (False, True):
            chosen = np.flatnonzero(self._near[here] == exact)
            for first in range(0, len(chosen), rows):
                yield chosen[first : first + rows], exact


def descend(curvature: np.ndarray, gradient: np.ndarray, *, damping: np.ndarray) -> np.ndarray:
    """-(curvature + damping)^-1 gradient for every search [S, p], downhill always.

    Gauss's elimination without pivots, vectorised over the searches; a pivot that is negative or
    almost 0 counts as its size, which makes the matrix positive.
    """
    size = gradient.shape[1]
    matrix = np.ascontiguousarray(curvature.transpose(1, 2, 0))
    right = np.ascontiguousarray(-gradient.T)
    for place in range(size):
        matrix[place, place] += damping
    pivots = []
    for place in range(size):
        pivot = np.maximum(np.abs(matrix[place, place]), 1e-11)
        pivots.append(pivot)
        below = matrix[place + 1 :, place] / pivot
        right[place + 1 :] -= below * right[place]
        matrix[place + 1 :, place + 1 :] -= below[:, None] * matrix[place, place + 1 :][None]
        matrix[place + 1 :, place] = below
    for place in reversed(range(size)):
        right[place] /= pivots[place]
        above = matrix[place + 1 :, place]
        right[place] -= np.einsum("ks,ks->s", above, right[place + 1 :])
    return right.T
