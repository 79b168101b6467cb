"""The laws that are a constant plus products of powers, written down term by term.

    L = offset + E + sum_k coefficient_k * prod_j column_j ^ -exponent_kj

| law | sum | source |
|---|---|---|
| `chinchilla` | E + A/N^alpha + B/D^beta | arXiv 2203.15556 eq. 2; arXiv 2504.07951 eq. 1 |
| `sparse` | E + A/N^alpha + B/D^beta + C/(1-S)^lambda + d/((1-S)^delta N^gamma) | 2504.07951 T12 |
| `interaction` | offset - C + A/N^alpha + B/D^beta, D of both modalities | arXiv 2301.03728 eq. 4 |
| `interaction_product` | offset - C + A/(N^alpha D^beta) | a misprint of eq. 4 that tests reject |

N is the size by the convention of the table (active parameters in sparse models), D are tokens, S
is the fraction of the parameters that a token does not pass through; the column `keep` is 1 - S.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np


@dataclass(frozen=True)
class Term:
    """coefficient * prod column ^ -exponent; the coefficient is positive."""

    coefficient: str
    powers: tuple[tuple[str, str], ...]  # (exponent, column)


@dataclass(frozen=True)
class Law:
    """A sum of terms with a constant of that sign; a constant of the sign -1 may have any value.

    A vector theta[p] of a fit is (sign * constant, log coefficient_1, exponents_1, ...).
    """

    name: str
    terms: tuple[Term, ...]
    constant: str = "E"
    sign: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """What a table must hold beside L."""
        return tuple(dict.fromkeys(c for term in self.terms for _, c in term.powers))

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters in the order of theta."""
        named = (
            (term.coefficient, *(exponent for exponent, _ in term.powers)) for term in self.terms
        )
        return (self.constant, *(name for names in named for name in names))

    @property
    def coefficient_places(self) -> list[int]:
        """Where theta holds logarithms."""
        return [self.names.index(term.coefficient) for term in self.terms]

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """theta[..., p] -> every parameter by its name, coefficients as they are printed."""
        values = np.array(theta, dtype=float)
        values[..., 0] *= self.sign
        with np.errstate(over="ignore"):  # of a resample that knows no coefficient
            values[..., self.coefficient_places] = np.exp(values[..., self.coefficient_places])
        return {name: values[..., place] for place, name in enumerate(self.names)}

    def theta(self, parameters: Mapping[str, float]) -> np.ndarray:
        """The inverse of `natural`."""
        values = np.array([parameters[name] for name in self.names], dtype=float)
        values[0] *= self.sign
        values[self.coefficient_places] = np.log(values[self.coefficient_places])
        return values

    def predict(
        self,
        parameters: Mapping[str, float] | Mapping[str, np.ndarray],
        *,
        columns: Mapping[str, np.ndarray],
        offset: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """The loss at each point of the columns."""
        loss = offset + self.sign * parameters[self.constant]
        for term in self.terms:
            powers = (columns[c] ** -parameters[exponent] for exponent, c in term.powers)
            loss = loss + parameters[term.coefficient] * np.prod(list(powers), axis=0)
        return np.asarray(loss)


CHINCHILLA = Law("chinchilla", (Term("A", (("alpha", "N"),)), Term("B", (("beta", "D"),))))
SPARSE = Law(
    "sparse",
    (
        *CHINCHILLA.terms,
        Term("C", (("lambda", "keep"),)),
        Term("d", (("gamma", "N"), ("delta", "keep"))),
    ),
)
INTERACTION = Law("interaction", CHINCHILLA.terms, constant="C", sign=-1)
INTERACTION_PRODUCT = Law(
    "interaction_product", (Term("A", (("alpha", "N"), ("beta", "D"))),), constant="C", sign=-1
)


@dataclass(frozen=True)
class Grid:
    """Where the searches start: all combinations of log coefficients, exponents, log constants."""

    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]
    constants: tuple[float, ...]

    def starts(self, law: Law) -> np.ndarray:
        """[S, p]; further terms start at A and alpha's values for all at once, not combined."""
        sides = min(2, len(law.terms))
        combined = product(self.constants, *[self.coefficients] * sides, *[self.exponents] * sides)
        return np.array([_start(law, values=np.array(values), sides=sides) for values in combined])


def _start(law: Law, *, values: np.ndarray, sides: int) -> np.ndarray:
    coefficients, exponents = values[1 : 1 + sides], values[1 + sides :]
    theta = [np.exp(values[0])]
    for place, term in enumerate(law.terms):
        side = place % sides
        theta += [coefficients[side], *[exponents[side]] * len(term.powers)]
    return np.array(theta)


# As printed in arXiv 2504.07951 appendix C: 1,764 starts. Its {0, 0.5, 2.5} may stand for a step.
NMM_GRID = Grid((0, 5, 10, 15, 20, 25, 30), (0, 0.5, 2.5), (-1, -0.5, 0.5, 1))
# Of arXiv 2404.10102 (the replication of arXiv 2203.15556): 4,500 starts.
EPOCH_GRID = Grid((0, 5, 10, 15, 20, 25), (0, 0.5, 1, 1.5, 2), (-1, -0.5, 0, 0.5, 1))
