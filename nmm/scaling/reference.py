"""The solver of the papers: scipy's L-BFGS from every start of a grid, one after the other.

It is what the batched solver is tested against, and takes eighty times as long. As in
arXiv 2203.15556 (D.3) and 2504.07951 (C), a constant that must be positive is fitted by its
logarithm; the synergy of two modalities may have either sign and is fitted as it is.
"""

import numpy as np
from scipy.optimize import minimize

from nmm.scaling.powers import PowerModel
from nmm.scaling.smooth import SmoothModel
from nmm.scaling.solve import Ends


def minimise_lbfgs(model: PowerModel | SmoothModel, starts: np.ndarray) -> Ends:
    """Follow every centred start[S, p], with exact gradients.

    The objective is divided by delta^2: scipy's tolerance is one of values of the order of 1, and
    stops early at an objective of 1e-3.
    """
    unit = model.delta**2
    one = np.zeros(1, dtype=int)

    def objective(logs: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(all="ignore"):  # a line search may look far out
            theta = logs[None].copy()
            theta[:, 0] = _constant(theta[:, 0], model=model)
            slopes = model.evaluate(theta, problems=one, exact=False)
            gradient = slopes.gradient[0] / unit
            gradient[0] *= theta[0, 0] if model.positive_constant else 1
        value = float(slopes.objective[0] / unit)
        return (value, gradient) if np.isfinite(value) else (1e300, np.zeros_like(gradient))

    theta = np.array(starts, dtype=float)
    iterations = np.zeros(len(theta), dtype=int)
    for place, start in enumerate(theta):
        logs = start.copy()
        if model.positive_constant:
            logs[0] = np.log(logs[0])
        options = {"maxiter": 2000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-10}
        found = minimize(objective, logs, jac=True, method="L-BFGS-B", options=options)
        theta[place] = found.x
        theta[place, :1] = _constant(found.x[:1], model=model)
        iterations[place] = found.nit
    slopes = model.evaluate(theta, problems=np.zeros(len(theta), dtype=int), exact=False)
    return Ends(theta, slopes.objective, slopes.gradient, iterations)


def _constant(value: np.ndarray, *, model: PowerModel | SmoothModel) -> np.ndarray:
    return np.exp(value) if model.positive_constant else value
