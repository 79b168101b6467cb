"""The loss as a function of size, tokens and the shares of the data's domains (arXiv 2507.09404).

    additive   L = E + 1 / sum_i C_i h_i^gamma_i + A/N^alpha + B/D^beta
    joint      the same with A_h = (sum_i C^A_i h_i)^kappa for A and
               B_h = (sum_i C^B_i h_i)^lambda for B

h_i is the share of domain i among the tokens; the shares of a point add up to 1, and any may be 0.
One law holds for one target loss. In the additive form the best shares do not depend on N and D; in
the joint form they do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

SHARE = "share/"  # prefix of the columns that hold the h_i
MIDDLE = {
    "N": 1e9,
    "D": 1e10,
}  # where log A and log B are taken, so that they are of the order of 1


@dataclass(frozen=True)
class MixtureLaw:
    """theta: E, log A, alpha, log B, beta, then log C_i, log gamma_i; joint: log a_i / a_1, ... .

    The joint form is written as A_h = A (sum_i a_i h_i)^kappa with a_i = C^A_i / C^A_1 and
    A = (C^A_1)^kappa, so that a_1 = 1 and A is the value at h = (1, 0, ..); likewise B_h.
    """

    domains: tuple[str, ...]
    joint: bool = False

    @property
    def name(self) -> str:
        return "mixture_joint" if self.joint else "mixture"

    @property
    def terms(self) -> int:
        return 2

    @property
    def columns(self) -> tuple[str, ...]:
        return ("N", "D", *(SHARE + domain for domain in self.domains))

    @property
    def names(self) -> tuple[str, ...]:
        names = ["E", "A", "alpha", "B", "beta"]
        names += [f"C_{domain}" for domain in self.domains]
        names += [f"gamma_{domain}" for domain in self.domains]
        if self.joint:
            names += [f"a_{domain}" for domain in self.domains[1:]] + ["kappa"]
            names += [f"b_{domain}" for domain in self.domains[1:]] + ["lambda"]
        return tuple(names)

    @property
    def _linear(self) -> list[bool]:
        """Which entries of theta are not logarithms."""
        return [name in ("E", "alpha", "beta", "kappa", "lambda") for name in self.names]

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """theta[..., p] -> every parameter by its name."""
        values = np.where(self._linear, theta, np.exp(np.where(self._linear, 0, theta)))
        found = dict(zip(self.names, np.moveaxis(values, -1, 0), strict=True))
        found["A"] = found["A"] * MIDDLE["N"] ** found["alpha"]
        found["B"] = found["B"] * MIDDLE["D"] ** found["beta"]
        return found

    def theta(self, parameters: Mapping[str, float]) -> np.ndarray:
        """The inverse of `natural`."""
        middle = dict(parameters)
        middle["A"] *= MIDDLE["N"] ** -middle["alpha"]
        middle["B"] *= MIDDLE["D"] ** -middle["beta"]
        values = np.array([middle[name] for name in self.names], dtype=float)
        return np.where(self._linear, values, np.log(np.where(self._linear, 1, values)))

    def predict(
        self, parameters: Mapping[str, float], *, columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """The loss at each point of the columns."""
        return self.loss(self.theta(parameters)[None], columns=columns)[0][0]

    def loss(
        self, theta: np.ndarray, *, columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(losses [S, n], derivatives [S, p, n])."""
        shares = np.stack([columns[SHARE + domain] for domain in self.domains])
        count = len(self.domains)
        derivatives = np.zeros((*theta.shape, shares.shape[1]))
        derivatives[:, 0] = 1
        loss = theta[:, :1] + _mixed(theta[:, 5 : 5 + 2 * count], shares, derivatives[:, 5:])
        joint = 5 + 2 * count
        for first, column in ((1, "N"), (3, "D")):
            x = np.log(columns[column] / MIDDLE[column])
            log = theta[:, first, None] - theta[:, first + 1, None] * x
            places = slice(joint + (count if first == 3 else 0), None)
            if self.joint:
                log = log + _blended(theta[:, places], shares, derivatives[:, places])
            term = np.exp(log)
            derivatives[:, first], derivatives[:, first + 1] = term, -term * x
            if self.joint:
                derivatives[:, places.start : places.start + count] *= term[:, None]
            loss = loss + term
        return loss, derivatives

    def starts(self, base: Mapping[str, float]) -> np.ndarray:
        """[S, p] around a fit of N and D alone, for some sizes and shapes of the shares' part."""
        count = len(self.domains)
        found = []
        for fraction in (0.1, 0.3, 0.6):
            for gamma in (0.1, 0.4, 1.0):
                found.append(self._start(base, fraction=fraction, gammas=[gamma] * count))
            for place in range(count):
                gammas = [0.1 + 0.7 * (other == place) for other in range(count)]
                found.append(self._start(base, fraction=fraction, gammas=gammas))
        return np.stack(found)

    def _start(
        self, base: Mapping[str, float], *, fraction: float, gammas: Sequence[float]
    ) -> np.ndarray:
        """A part of the constant is given to the shares."""
        ones = dict.fromkeys(self.names, 1.0) | {"kappa": 0.3, "lambda": 0.3}
        parameters = {**ones, **base, "E": base["E"] * (1 - fraction)}
        for domain, gamma in zip(self.domains, gammas, strict=True):
            parameters[f"gamma_{domain}"] = gamma
            parameters[f"C_{domain}"] = 1 / (base["E"] * fraction)
        return self.theta(parameters)


def _mixed(theta: np.ndarray, shares: np.ndarray, derivatives: np.ndarray) -> np.ndarray:
    """1 / sum_i C_i h_i^gamma_i [S, n]; fills the derivatives by log C_i and log gamma_i."""
    count = len(shares)
    logs = np.log(np.where(shares > 0, shares, 1))
    gammas = np.exp(theta[:, count:, None])
    parts = np.where(shares > 0, np.exp(theta[:, :count, None] + gammas * logs), 0)
    value = 1 / parts.sum(1)
    by_log = -parts * np.square(value)[:, None]
    derivatives[:, :count] = by_log
    derivatives[:, count : 2 * count] = by_log * gammas * logs
    return value


def _blended(theta: np.ndarray, shares: np.ndarray, derivatives: np.ndarray) -> np.ndarray:
    """kappa log(h_1 + sum_i a_i h_i) [S, n]; fills the derivatives by log a_i and kappa."""
    count = len(shares)
    parts = np.exp(theta[:, : count - 1, None]) * shares[1:]
    total = shares[0] + parts.sum(1)
    kappa = theta[:, count - 1, None]
    derivatives[:, : count - 1] = kappa[:, None] * parts / total[:, None]
    derivatives[:, count - 1] = np.log(total)
    return kappa * np.log(total)


def best_shares(
    laws: Sequence[tuple[MixtureLaw, Mapping[str, float]]],
    *,
    size: float,
    tokens: float,
    weights: Sequence[float] | None = None,
    near: Mapping[str, float] | None = None,
) -> tuple[dict[str, float], float]:
    """The shares with the lowest (weighted) mean of the laws' losses, and that loss.

    Searched from the centre and from near every corner of the simplex, by softmax coordinates; or
    only from the shares `near`, to three digits.
    """
    domains = laws[0][0].domains
    weights = weights if weights is not None else [1 / len(laws)] * len(laws)
    if near is None:
        starts, options = [np.zeros(len(domains)), *(2.0 * np.eye(len(domains)))], _FINE
    else:
        starts = [np.log([max(near[name], 1e-4) for name in domains])]
        options = _COARSE

    def mean_loss(logits: np.ndarray) -> float:
        shares = np.exp(logits - logits.max())
        columns = {
            SHARE + name: shares[[place]] / shares.sum() for place, name in enumerate(domains)
        }
        columns |= {"N": np.array([size]), "D": np.array([tokens])}
        predicted = [law.predict(parameters, columns=columns)[0] for law, parameters in laws]
        return float(np.dot(weights, predicted))

    ends = [minimize(mean_loss, start, method="Nelder-Mead", options=options) for start in starts]
    best = min(ends, key=lambda end: end.fun)
    shares = np.exp(best.x - best.x.max())
    return dict(zip(domains, (shares / shares.sum()).tolist(), strict=True)), float(best.fun)


_FINE = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 10_000, "maxfev": 10_000}
_COARSE = {"xatol": 1e-3, "fatol": 1e-9, "maxiter": 1000, "maxfev": 1000}
