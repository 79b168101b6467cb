"""Coefficients as the papers print them, to stand beside ours; None where nothing is printed.

Laws of N and D: arXiv 2504.07951, tables 2, 3, 11 and 12 and the frontiers of its figures 5, 9 and
26 to 28 (its dense A and B are not published); arXiv 2203.15556 and its replication 2404.10102.
`c` and `k` are those of L = k C^c. The paper prints the sparse frontier twice, differently.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MEAN, TEXT = "loss", "loss/kind/text"
CAPTION, INTERLEAVED = "loss/kind/caption", "loss/kind/interleaved"


@dataclass(frozen=True)
class Printed:
    """One row; `loss` is that of `fit --runs`: "loss" is the mean of the kinds."""

    family: str
    loss: str
    E: float | None = None
    alpha: float | None = None
    beta: float | None = None
    a: float | None = None
    b: float | None = None
    d: float | None = None
    c: float | None = None
    k: float | None = None
    A: float | None = None
    B: float | None = None


_EARLY, _LATE, _SPARSE = "early, 45-45-10", "late, 45-45-10", "sparse early, 8 experts"

PRINTED = (
    Printed(_EARLY, MEAN, 1.904, 0.301, 0.335, 0.5262, 0.473, 0.8987, -0.0492, 29.574),
    Printed(f"{_EARLY}, mean of 100 resamples", MEAN, 1.809, 0.298, 0.332, 0.543, 0.483, 0.924),
    Printed(_EARLY, TEXT, 2.222, 0.3084, 0.3375, 0.5246, 0.4774, 0.9085, -0.042, 22.709),
    Printed(_EARLY, CAPTION, 1.569, 0.3111, 0.3386, 0.5203, 0.4785, 0.9187, -0.061, 47.97),
    Printed(_EARLY, INTERLEAVED, 1.966, 0.2971, 0.338, 0.5315, 0.468, 0.8791, -0.0459, 25.114),
    Printed("early, 40-20-40", MEAN, 1.965, 0.328, 0.348, 0.518, 0.486, 0.937, -0.0486, 28.59),
    Printed("early, 40-20-40", TEXT, c=-0.042, k=21.352),
    Printed("early, 40-20-40", CAPTION, c=-0.061, k=49.477),
    Printed("early, 40-20-40", INTERLEAVED, c=-0.043, k=22.112),
    Printed("early, 30-30-40", MEAN, 1.847, 0.253, 0.338, 0.572, 0.428, 0.748, -0.0463, 25.623),
    Printed("early, 30-30-40", TEXT, c=-0.041, k=20.257),
    Printed("early, 30-30-40", CAPTION, c=-0.056, k=39.518),
    Printed("early, 30-30-40", INTERLEAVED, c=-0.043, k=22.111),
    Printed("early, 20-40-40", MEAN, 1.836, 0.259, 0.354, 0.582, 0.423, 0.726, -0.0488, 29.002),
    Printed("early, 20-40-40", TEXT, c=-0.0425, k=22.15),
    Printed("early, 20-40-40", CAPTION, c=-0.0589, k=46.216),
    Printed("early, 20-40-40", INTERLEAVED, c=-0.045, k=23.888),
    Printed(_LATE, MEAN, 1.891, 0.2903, 0.3383, 0.6358, 0.4619, 0.6732, -0.0494, 29.923),
    Printed(_LATE, TEXT, c=-0.042, k=22.642),
    Printed(_LATE, CAPTION, c=-0.062, k=49.99),
    Printed(_LATE, INTERLEAVED, c=-0.046, k=25.303),
    Printed(
        _SPARSE,
        MEAN,
        2.158,
        0.71,
        0.372,
        0.361,
        0.656,
        1.797,
        -0.047,
        26.287,
        A=381_773,
        B=4659,
    ),
    Printed(f"{_SPARSE}, figure 26", MEAN, c=-0.048, k=27.086),
    Printed(_SPARSE, TEXT, c=-0.04, k=20.036),
    Printed(_SPARSE, CAPTION, c=-0.064, k=51.857),
    Printed(_SPARSE, INTERLEAVED, c=-0.044, k=22.715),
    Printed("GPT-3 (text)", MEAN, c=-0.048),
    Printed("Chinchilla (text)", MEAN, 1.693, 0.339, 0.285, 0.46, 0.54, A=406.4, B=410.7),
    Printed(
        "Chinchilla, by others", MEAN, 1.8172, 0.3478, 0.3658, 0.513, 0.487, A=482.01, B=2085.43
    ),
)

# arXiv 2504.07951, table 10: mean squared error, R2 and mean error in percent.
PRINTED_METRICS = {
    "early, 45-45-10, fitted": (0.0029, 0.9807, 0.8608),
    "early, 45-45-10, held out (8.13B)": (0.0004, 0.9682, 0.5530),
}

# Of other laws, by the name of the law: where it is printed, and the values.
PRINTED_LAWS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "sparse": {
        "arXiv 2504.07951, table 12 (S never varied)": {
            "E": 1.0788,
            "A": 1,
            "alpha": 0.589,
            "B": 4660,
            "beta": 0.372,
            "C": 1.0788,
            "lambda": 0.2,
            "d": 381_475,
            "gamma": 0.70956,
            "delta": 0.2,
        }
    },
    "repeated": {
        "arXiv 2305.16264": {
            "E": 1.869,
            "A": 520.8,
            "alpha": 0.3527,
            "B": 1487.7,
            "beta": 0.3527,
            "R_D": 15.39,
            "R_N": 5.310,
        }
    },
}

# arXiv 2507.09404 on native multimodal models: mean error in percent of unseen mixtures and sizes.
PRINTED_MIXTURE_ERRORS = {"text": 0.44, "interleaved": 0.48, "caption": 0.95}

# arXiv 2301.03728, table 1 as others quote it: alpha and beta of a modality alone.
PRINTED_ALONE = {
    "code": (0.37, 0.32),
    "molecule": (0.37, 0.26),
    "speech": (0.31, 0.24),
    "text": (0.18, 0.22),
    "image": (0.13, 0.13),
}
PRINTED_BARRIER = ("speech and text", 28.35e9, 45.12e9)
