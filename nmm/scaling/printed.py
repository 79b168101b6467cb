"""Coefficients as the papers print them, to stand beside ours; None where nothing is printed.

arXiv 2504.07951, tables 2, 3 and 12 (its dense A and B are not published), arXiv 2203.15556 and its
replication arXiv 2404.10102. `c` and `k` are those of L = k C^c.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """One row; `loss` is that of `fit --runs`: "loss" is the mean of the kinds."""

    family: str
    loss: str
    E: float
    alpha: float
    beta: float
    a: float | None
    b: float | None
    c: float | None = None
    d: float | None = None
    k: float | None = None
    A: float | None = None
    B: float | None = None


PRINTED = (
    Printed("early, 45-45-10", "loss", 1.904, 0.301, 0.335, 0.5262, 0.473, -0.0492, 0.8987, 29.574),
    Printed(
        "early, 45-45-10",
        "loss/kind/text",
        2.222,
        0.3084,
        0.3375,
        0.5246,
        0.4774,
        -0.0420,
        0.9085,
        22.709,
    ),
    Printed(
        "early, 45-45-10",
        "loss/kind/caption",
        1.569,
        0.3111,
        0.3386,
        0.5203,
        0.4785,
        -0.0610,
        0.9187,
        47.97,
    ),
    Printed(
        "early, 45-45-10",
        "loss/kind/interleaved",
        1.966,
        0.2971,
        0.338,
        0.5315,
        0.4680,
        -0.0459,
        0.8791,
        25.114,
    ),
    Printed("early, 40-20-40", "loss", 1.965, 0.328, 0.348, 0.518, 0.486, -0.0486, 0.937, 28.590),
    Printed("early, 30-30-40", "loss", 1.847, 0.253, 0.338, 0.572, 0.428, -0.0463, 0.748, 25.623),
    Printed("early, 20-40-40", "loss", 1.836, 0.259, 0.354, 0.582, 0.423, -0.0488, 0.726, 29.002),
    Printed(
        "late, 45-45-10", "loss", 1.891, 0.2903, 0.3383, 0.6358, 0.4619, -0.0494, 0.6732, 29.923
    ),
    Printed(
        "sparse early, 8 experts",
        "loss",
        2.158,
        0.710,
        0.372,
        0.361,
        0.656,
        -0.047,
        1.797,
        26.287,
        A=381_773,
        B=4659,
    ),
    Printed("Chinchilla (text)", "loss", 1.693, 0.339, 0.285, 0.46, 0.54, A=406.4, B=410.7),
    Printed("its replication", "loss", 1.8172, 0.3478, 0.3658, 0.513, 0.487, A=482.01, B=2085.43),
)
