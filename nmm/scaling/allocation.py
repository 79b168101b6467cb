"""The best split of a compute budget into size and tokens, and its exponents, two ways.

    N_opt ~ C^a    D_opt ~ C^b    D_opt ~ N_opt^d    L_opt ~ C^c

**Closed form** (C = 6 N D, arXiv 2203.15556 eq. 4): N_opt = G (C/6)^a, D_opt = (C/6)^b / G with
G = (alpha A / (beta B))^(1/(alpha+beta)), a = beta/(alpha+beta), b = alpha/(alpha+beta), d = b/a.
**Regression** (arXiv 2504.07951 appendix C): at every C of the runs try many D and N = C/(6D), keep
the pair with the lowest predicted loss, and fit lines to the logarithms of the pairs.

Late fusion spends C = 6 (N_v D_v + N_t D) with N = N_t + N_v. With D_v = f D and N_v = p + q N that
is C = 6 D (N - k N_v), k = 1 - f (0.456 for the 0.544 of 45-45-10; the paper prints 0.483 once).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

FLOPS_PER_PARAMETER_TOKEN = 6
TRIED_TOKENS = 2000  # values of D per C in the regression
SPAN = 100.0  # the frontier of a law is read over this factor of C where the data give no range


@dataclass(frozen=True)
class Accounting:
    """C = 6 D (N - saved * N_v), N_v = intercept + slope * N; the defaults are C = 6 N D."""

    saved: float = 0.0
    intercept: float = 0.0
    slope: float = 0.0

    def flops(self, *, size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        vision = self.intercept + self.slope * size
        return FLOPS_PER_PARAMETER_TOKEN * tokens * (size - self.saved * vision)

    def size(self, *, flops: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """N that spends these FLOPs on these tokens."""
        spent = flops / (FLOPS_PER_PARAMETER_TOKEN * tokens)
        return (spent + self.saved * self.intercept) / (1 - self.saved * self.slope)

    def tokens(self, *, flops: np.ndarray, size: np.ndarray) -> np.ndarray:
        """D that spends these FLOPs with this N."""
        return flops / self.flops(size=size, tokens=np.ones_like(size))


def late_fusion(
    *, size: np.ndarray, vision: np.ndarray, tokens: np.ndarray, vision_tokens: np.ndarray
) -> Accounting:
    """The accounting of measured runs: N_v as a line in N, and the mean of D_v / D."""
    slope, intercept = np.polyfit(size, vision, 1) if np.ptp(size) > 0 else (0.0, vision.mean())
    saved = 1 - float(np.mean(vision_tokens / tokens))
    return Accounting(saved=saved, intercept=float(intercept), slope=float(slope))


def closed_form(parameters: Mapping[str, np.ndarray | float]) -> dict[str, np.ndarray | float]:
    """`a`, `b`, `d` and `G` of a law's parameters, numbers or arrays of them."""
    alpha, beta = parameters["alpha"], parameters["beta"]
    both = alpha + beta
    scale = (alpha * parameters["A"] / (beta * parameters["B"])) ** (1 / both)
    return {"a": beta / both, "b": alpha / both, "d": alpha / beta, "G": scale}


def optimum(
    parameters: Mapping[str, np.ndarray | float], *, flops: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """(N_opt, D_opt) by the closed form, C = 6 N D."""
    exponents = closed_form(parameters)
    spent = np.asarray(flops) / FLOPS_PER_PARAMETER_TOKEN
    scale = exponents["G"]
    return scale * spent ** exponents["a"], spent ** exponents["b"] / scale


def numeric_optimum(
    parameters: Mapping[str, float] | Mapping[str, np.ndarray],
    *,
    flops: np.ndarray,
    accounting: Accounting,
) -> tuple[np.ndarray, np.ndarray]:
    """(N_opt, D_opt) where the loss at fixed C is flat, by bisection in log N; any accounting.

    Along C the derivative of the loss by log N is -alpha A N^-alpha + beta B D^-beta * e, with
    e = -d log D / d log N.
    """
    p = parameters
    low = np.full(flops.shape, np.log(max(1.0, accounting.saved * accounting.intercept * 1.01)))
    high = np.log(flops)
    for _ in range(200):
        middle = (low + high) / 2
        size = np.exp(middle)
        tokens = accounting.tokens(flops=flops, size=size)
        counted = size * (1 - accounting.saved * accounting.slope)
        elasticity = counted / (counted - accounting.saved * accounting.intercept)
        by_size = p["alpha"] * p["A"] * size ** -p["alpha"]
        by_tokens = p["beta"] * p["B"] * tokens ** -p["beta"] * elasticity
        larger = by_size > by_tokens
        low, high = np.where(larger, middle, low), np.where(larger, high, middle)
    size = np.exp((low + high) / 2)
    return size, accounting.tokens(flops=flops, size=size)


@dataclass(frozen=True)
class Regression:
    """Exponents by lines through tried pairs; `edge` of them, at an end of the D, are left out."""

    a: float
    b: float
    d: float
    points: int
    edge: int


def regression(
    parameters: Mapping[str, float],
    *,
    flops: np.ndarray,
    tokens: tuple[float, float],
    accounting: Accounting,
    spaced: str = "log",
) -> Regression | None:
    """The paper's regression over D between the two `tokens`; None with fewer than two pairs.

    `spaced` is `log` (the paper's text) or `linear` (its appendix).
    """
    space = np.geomspace if spaced == "log" else np.linspace
    tried = space(*tokens, TRIED_TOKENS)
    size = accounting.size(flops=flops[:, None], tokens=tried[None])
    p = parameters
    loss = p["E"] + p["A"] * size ** -p["alpha"] + p["B"] * tried ** -p["beta"]
    best = loss.argmin(1)
    inside = (best > 0) & (best < TRIED_TOKENS - 1)
    log_size = np.log(size[np.arange(len(best)), best])[inside]
    log_tokens, log_flops = np.log(tried[best])[inside], np.log(flops)[inside]
    if inside.sum() < 2 or np.ptp(log_flops) == 0 or np.ptp(log_tokens) == 0:
        return None
    return Regression(
        a=float(np.polyfit(log_flops, log_size, 1)[0]),
        b=float(np.polyfit(log_flops, log_tokens, 1)[0]),
        d=float(np.polyfit(log_size, log_tokens, 1)[0]),
        points=int(inside.sum()),
        edge=int((~inside).sum()),
    )


def frontier_exponent(
    parameters: Mapping[str, np.ndarray], *, flops: tuple[float, float]
) -> np.ndarray:
    """c of L = k C^c through the law's own best losses between two C; parameters may be arrays."""
    logs = np.linspace(np.log(flops[0]), np.log(flops[1]), 50)
    columns = {name: np.asarray(value)[..., None] for name, value in parameters.items()}
    size, tokens = optimum(columns, flops=np.exp(logs))
    p = columns
    loss = np.log(p["E"] + p["A"] * size ** -p["alpha"] + p["B"] * tokens ** -p["beta"])
    centred = logs - logs.mean()
    return (loss * centred).sum(-1) / np.square(centred).sum()
