"""Coordinates in which the valleys of a sum of powers are straight.

With T_k the terms in the middle of the data: the value E + sum T_k there, the slopes
T_k * exponent, and the exponents. A constant and a flat term are told apart by little; their sum
and the slope are what the data know, and a search that trades one for the other walks along an axis
instead of a bent canyon. Of the 4,500 starts of arXiv 2404.10102's grid 98 % reach the lowest
minimum in these coordinates, 30 % in the logarithms that are printed.
"""

from collections.abc import Sequence

import numpy as np

SMALLEST_TERM = 1e-9  # nats in the middle of the data


def straighten(theta: np.ndarray, *, firsts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """theta[S, p] -> (the coordinates [S, p], d theta / d coordinates [S, p, p]).

    theta[:, 0] is the constant; at every place of `firsts` is the log of a term, then its exponent.
    """
    size = theta.shape[1]
    flat = theta.copy()
    jacobian = np.zeros((len(theta), size, size))
    jacobian[:, range(size), range(size)] = 1
    for first in firsts:
        term, exponent = np.exp(theta[:, first]), theta[:, first + 1]
        flat[:, 0] += term
        flat[:, first] = term * exponent
        jacobian[:, 0, first] = -1 / exponent
        jacobian[:, 0, first + 1] = term / exponent
        jacobian[:, first, first] = 1 / flat[:, first]
        jacobian[:, first, first + 1] = -1 / exponent
    return flat, jacobian


def bend(
    flat: np.ndarray, *, firsts: Sequence[int], positive_constant: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse: (theta, where it exists [S]); a term or the constant may have lost its sign."""
    theta = flat.copy()
    exists = np.ones(len(flat), dtype=bool)
    with np.errstate(all="ignore"):
        for first in firsts:
            term = flat[:, first] / flat[:, first + 1]
            exists &= (term > SMALLEST_TERM) & np.isfinite(term)
            theta[:, first] = np.log(term)
            theta[:, 0] -= term
    if positive_constant:
        exists &= theta[:, 0] > SMALLEST_TERM
    return theta, exists
