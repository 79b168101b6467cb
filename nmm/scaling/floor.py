"""Searches that may end where a law's constant is nothing.

Losses that still fall as a power of N and D know no irreducible loss: the lowest objective is at
E = 0, the end of the range and no minimum, where a search in all parameters creeps without end.
From there it goes on in the others, with E held; where E then wants to grow, in all of them again.
"""

import numpy as np

from nmm.scaling.powers import PowerModel
from nmm.scaling.smooth import SmoothModel
from nmm.scaling.solve import DONE, Ends, Slopes, minimise
from nmm.scaling.valleys import SMALLEST_TERM

LARGEST_LOG = 600.0  # of a coefficient; float64 ends at 709
NOTHING = 1e-4  # of the lowest loss: less is no floor that anybody could tell


def search(
    model: PowerModel | SmoothModel,
    starts: np.ndarray,
    *,
    problems: np.ndarray | None = None,
    done: float = DONE,
) -> Ends:
    """Follow every centred start[S, p] to where it can go down no further, E = 0 included.

    The gradient has no derivative by an E that is held.
    """
    if problems is None:
        problems = np.zeros(len(starts), dtype=int)
    ends = minimise(model, starts, problems=problems, done=done)
    if isinstance(model, PowerModel) and model.positive_constant:
        creeping = np.flatnonzero(ends.theta[:, 0] < _nothing(model))
        _go_on(ends, _Held(model), creeping, problems=problems, done=done)
        whole = model.evaluate(ends.theta[creeping], problems=problems[creeping], exact=False)
        rising = creeping[whole.gradient[:, 0] < 0]
        _go_on(ends, model, rising, problems=problems, done=done)
    return ends


def _nothing(model: PowerModel) -> float:
    """The constant below which the points tell of none, in nats."""
    return NOTHING * float(np.exp(model.log_loss.min()))


def _go_on(
    ends: Ends,
    model: "PowerModel | _Held",
    here: np.ndarray,
    *,
    problems: np.ndarray,
    done: float,
) -> None:
    if len(here) == 0:
        return
    starts = ends.theta[here]
    starts[:, 0] = np.maximum(starts[:, 0], 2 * SMALLEST_TERM)
    found = minimise(model, starts, problems=problems[here], done=done)
    lower = found.objective <= ends.objective[here]
    ends.iterations[here] += found.iterations
    for kept, new in ((ends.theta, found.theta), (ends.gradient, found.gradient)):
        kept[here[lower]] = new[lower]
    ends.objective[here[lower]] = found.objective[lower]


class _Held:
    """The model with its constant held; see `nmm.scaling.solve.Model`."""

    iterations = 200  # without the constant the valleys are not straight

    def __init__(self, model: PowerModel) -> None:
        self._model = model

    @property
    def points(self) -> int:
        return self._model.points

    def evaluate(self, theta: np.ndarray, *, problems: np.ndarray, exact: bool) -> Slopes:
        slopes = self._model.evaluate(theta, problems=problems, exact=exact)
        slopes.gradient[:, 0] = 0
        slopes.curvature[:, 0] = slopes.curvature[:, :, 0] = 0
        slopes.curvature[:, 0, 0] = 1
        return slopes

    def straighten(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count, size = theta.shape
        return theta.copy(), np.broadcast_to(np.eye(size), (count, size, size)).copy()

    def bend(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Terms are no smaller than elsewhere, and coefficients stay numbers when printed."""
        firsts = self._model.law.coefficient_places
        middle, printed = flat[:, firsts], self._model.uncentred(flat)[:, firsts]
        exists = (middle > np.log(SMALLEST_TERM)) & (printed < LARGEST_LOG)
        return flat.copy(), np.asarray(exists.all(axis=1))


def to_print(name: str, value: float) -> float:
    """A parameter as people read it: an E that is nothing beside a loss of one nat is 0."""
    return 0.0 if name == "E" and value < NOTHING else value
