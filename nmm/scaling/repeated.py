"""The loss when tokens repeat (arXiv 2305.16264, eq. 5 and 6): later passes are worth less.

    L = E + A/N'^alpha + B/D'^beta
    D' = U_D (1 + R_D (1 - exp(-r_D / R_D)))      r_D = D / U_D - 1     U_D = min(unique tokens, D)
    N' = U_N (1 + R_N (1 - exp(-r_N / R_N)))      r_N = N / U_N - 1     U_N = min(N, N_opt(U_D))

N_opt(U_D) is the size whose compute-optimal number of tokens is U_D, by the closed form of
`nmm/scaling/allocation.py`. Here all seven parameters are fitted together; the paper fits the other
five first, on runs without repetition, and then R_D and R_N.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nmm.scaling.laws import CHINCHILLA

MIDDLE = {
    "N": 1e9,
    "D": 1e10,
}  # where log A and log B are taken, so that they are of the order of 1


@dataclass(frozen=True)
class RepeatedLaw:
    """theta: E, log A, alpha, log B, beta, log R_D, log R_N; columns N, D and U (unique tokens)."""

    name: str = "repeated"

    @property
    def terms(self) -> int:
        return 2

    @property
    def columns(self) -> tuple[str, ...]:
        return ("N", "D", "U")

    @property
    def names(self) -> tuple[str, ...]:
        return ("E", "A", "alpha", "B", "beta", "R_D", "R_N")

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """theta[..., p] -> every parameter by its name."""
        e, a, alpha, b, beta, *stars = np.moveaxis(np.asarray(theta, dtype=float), -1, 0)
        values = (
            e,
            np.exp(a) * MIDDLE["N"] ** alpha,
            alpha,
            np.exp(b) * MIDDLE["D"] ** beta,
            beta,
            *(np.exp(star) for star in stars),
        )
        return dict(zip(self.names, values, strict=True))

    def theta(self, parameters: Mapping[str, float]) -> np.ndarray:
        """The inverse of `natural`."""
        p = parameters
        a = np.log(p["A"]) - p["alpha"] * np.log(MIDDLE["N"])
        b = np.log(p["B"]) - p["beta"] * np.log(MIDDLE["D"])
        stars = np.log([p["R_D"], p["R_N"]])
        return np.array([p["E"], a, p["alpha"], b, p["beta"], *stars])

    def predict(
        self, parameters: Mapping[str, float], *, columns: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """The loss at each point of the columns."""
        return self.loss(self.theta(parameters)[None], columns=columns)[0][0]

    def loss(
        self, theta: np.ndarray, *, columns: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(losses [S, n], derivatives [S, 7, n])."""
        e, a, alpha, b, beta, star_d, star_n = theta.T[:, :, None]
        unique = np.minimum(columns["U"], columns["D"])
        tokens, by_star_d, _ = effective(columns["D"], unique=unique, log_star=star_d)
        best, by_base = _best_size(theta, np.log(unique))
        fitting = np.minimum(columns["N"], np.exp(best))
        size, by_star_n, by_unit = effective(columns["N"], unique=fitting, log_star=star_n)
        by_unit = np.where(np.exp(best) < columns["N"], by_unit, 0)
        x, y = np.log(size / MIDDLE["N"]), np.log(tokens / MIDDLE["D"])
        of_size, of_tokens = np.exp(a - alpha * x), np.exp(b - beta * y)
        derivatives = np.zeros((*theta.shape, x.shape[1]))
        derivatives[:, 1:5] = (-of_size * alpha * by_unit)[:, None] * by_base
        derivatives[:, 0] += 1
        derivatives[:, 1] += of_size
        derivatives[:, 2] -= of_size * x
        derivatives[:, 3] += of_tokens
        derivatives[:, 4] -= of_tokens * y
        derivatives[:, 5] = -of_tokens * beta * by_star_d
        derivatives[:, 6] = -of_size * alpha * by_star_n
        return e + of_size + of_tokens, derivatives

    def starts(self, base: Mapping[str, float]) -> np.ndarray:
        """[S, 7] around a fit of N and D alone, for several values of R_D and R_N.

        Repetition bends that fit; so there are also starts with common exponents, whose terms at
        N = 1e9 and D = 1e10 are parts of its loss there.
        """
        middle = {name: np.array(value) for name, value in MIDDLE.items()}
        loss = float(CHINCHILLA.predict(base, columns=middle))
        stars = [(d, n) for d in (1.0, 5.0, 20.0) for n in (1.0, 5.0, 20.0)]
        found = []
        for fraction in (0.1, 0.3):
            log_term = np.log(loss * fraction)
            plain = [loss * (1 - 2 * fraction), log_term, 0.35, log_term, 0.35]
            found += [[*plain, np.log(d), np.log(n)] for d, n in stars]
        if min(base["alpha"], base["beta"]) > 0:
            found += [self.theta({**base, "R_D": d, "R_N": n}).tolist() for d, n in stars]
        return np.array(found)


def effective(
    count: np.ndarray, *, unique: np.ndarray, log_star: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(effective count, d log of it by log_star, d log of it by log unique), count >= unique.

    With 1 pass it is the count; with many it approaches unique * (1 + star).
    """
    star = np.exp(log_star)
    passes = count / unique - 1
    left = np.exp(-passes / star)
    found = 1 + star * (1 - left)
    by_star = (star * (1 - left) - passes * left) / found
    by_unique = 1 - left * (passes + 1) / found
    return unique * found, by_star, by_unique


def _best_size(theta: np.ndarray, log_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log N_opt of the tokens [S, n], and its derivatives [S, 4, n] by log A, alpha, log B, beta.

    From alpha A N^-alpha = beta B D^-beta.
    """
    _, a, alpha, b, beta, *_ = theta.T[:, :, None]
    y = log_tokens - np.log(MIDDLE["D"])
    inside = np.log(alpha / beta) + a - b + beta * y
    ones = np.ones_like(y)
    by = (ones / alpha, (1 / alpha - inside / alpha) / alpha, -ones / alpha, (y - 1 / beta) / alpha)
    return np.log(MIDDLE["N"]) + inside / alpha, np.stack(by, axis=1)
