"""Planted laws come back: every parameter lies in its own 95 % interval in 90 of 100 seeds.

Noise is normal on the log of the loss, with the standard deviation that each test states.
"""

import numpy as np
import pytest

from nmm.scaling.bootstrap import intervals
from nmm.scaling.frontier import line_of
from nmm.scaling.frontier_resamples import frontier_intervals
from nmm.scaling.laws import CHINCHILLA, INTERACTION, SPARSE
from nmm.scaling.mixed import fit_pair, mean_alone
from nmm.scaling.mixtures import SHARE, MixtureLaw
from nmm.scaling.points import Points
from nmm.scaling.repeated import RepeatedLaw
from tests.scaling_cases import NMM, SEEDS, SIZES, SMALL_GRID, covered, design, planted

ENOUGH = 90
DOMAINS = ("caption", "interleaved", "text")
MIXTURES = np.array(
    [
        [0.45, 0.45, 0.1],
        [0.4, 0.2, 0.4],
        [0.3, 0.3, 0.4],
        [0.2, 0.4, 0.4],
        [0.1, 0.1, 0.8],
        [0.8, 0.1, 0.1],
        [0.1, 0.8, 0.1],
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0.5, 0.5, 0],
        [0, 0.5, 0.5],
    ]
)
MIXED = NMM | {
    "E": 1.2,
    "C_caption": 1.2,
    "C_interleaved": 0.8,
    "C_text": 0.5,
    "gamma_caption": 0.3,
    "gamma_interleaved": 0.6,
    "gamma_text": 0.4,
}
BLENDED = {
    "a_interleaved": 1.5,
    "a_text": 0.6,
    "kappa": 0.7,
    "b_interleaved": 0.5,
    "b_text": 1.6,
    "lambda": 0.4,
}


def mixtures() -> dict[str, np.ndarray]:
    """Three sizes, three numbers of tokens, twelve mixtures, corners of the simplex included."""
    found = design(N=SIZES[:3], D=np.geomspace(2.5e9, 2e11, 3), place=np.arange(12.0))
    place = found.pop("place").astype(int)
    return found | {SHARE + name: MIXTURES[place, i] for i, name in enumerate(DOMAINS)}


def test_size_and_tokens() -> None:
    """The sizes of arXiv 2504.07951 and 12 token counts each, noise 0.5 %."""
    columns = design(N=SIZES, D=np.geomspace(2.5e9, 6e11, 12))
    found = covered(CHINCHILLA, NMM, columns=columns, noise=0.005, resamples=200)
    assert min(found.values()) >= ENOUGH, found


def test_sparsity() -> None:
    """Three sizes, five token counts, 0 to 7/8 of the parameters asleep, noise 0.1 %."""
    truth = NMM | {"E": 1.2, "C": 0.4, "lambda": 0.25, "d": 250.0, "gamma": 0.31, "delta": 0.3}
    asleep = np.array([1, 0.5, 0.25, 0.125])
    columns = design(N=SIZES[::2], D=np.geomspace(2.5e9, 6e11, 5), keep=asleep)
    found = covered(SPARSE, truth, columns=columns, noise=0.001, resamples=100)
    assert min(found.values()) >= ENOUGH, found


def test_repeated_tokens() -> None:
    """Four sizes, three corpora, 1 to 60 passes, noise 0.2 %; parameters as in arXiv 2305.16264."""
    truth = {"E": 1.87, "A": 521, "alpha": 0.353, "B": 1488, "beta": 0.353, "R_D": 15.4, "R_N": 5.3}
    passes = np.array([1.0, 3, 10, 30, 60])
    columns = design(N=np.geomspace(1e8, 8e9, 4), U=np.geomspace(1e9, 4e10, 3), passes=passes)
    columns["D"] = columns["U"] * columns.pop("passes")
    found = covered(RepeatedLaw(), truth, columns=columns, noise=0.002, resamples=100)
    assert min(found.values()) >= ENOUGH, found


def test_mixtures_additive() -> None:
    """Noise 0.2 %."""
    law = MixtureLaw(DOMAINS)
    found = covered(law, MIXED, columns=mixtures(), noise=0.002, resamples=100)
    assert min(found.values()) >= ENOUGH, found


def test_mixtures_joint() -> None:
    """Noise 0.2 %."""
    law = MixtureLaw(DOMAINS, joint=True)
    found = covered(law, MIXED | BLENDED, columns=mixtures(), noise=0.002, resamples=100)
    assert min(found.values()) >= ENOUGH, found


def test_frontier_and_parabolas() -> None:
    """L = k C^c + 0.02 log(N / N_opt)^2, N_opt ~ C^a: nine sizes at twelve C, noise 0.2 %."""
    truth = {"k": 29.574, "c": -0.0492, "isoflop_a": 0.526}
    levels = np.geomspace(3e19, 3e21, 12)
    best = 5e8 * (levels / levels[0]) ** truth["isoflop_a"]
    columns = design(N=np.geomspace(best[0] / 1.5, best[-1] * 1.5, 9), place=np.arange(12.0))
    place = columns.pop("place").astype(int)
    flops, size = levels[place], columns["N"]
    clean = truth["k"] * flops ** truth["c"] + 0.02 * np.log(size / best[place]) ** 2
    still = line_of(flops=flops, loss=clean, size=size)
    assert (still.k, still.c, still.isoflop_a) == pytest.approx(tuple(truth.values()), rel=1e-6)
    hits = dict.fromkeys(truth, 0)
    for seed in range(SEEDS):
        noise = 0.002 * np.random.default_rng(seed).normal(size=len(clean))
        runs = {"flops": flops, "loss": clean * np.exp(noise), "size": size}
        found = frontier_intervals(
            line_of(**runs), **runs, least_flops=0.0, resamples=40, seed=seed
        )
        for name, (low, high) in found.items():
            hits[name] += low <= truth[name] <= high
    assert min(hits.values()) >= ENOUGH, hits


def test_two_modalities() -> None:
    """Six sizes and five token counts, alone and half and half, noise 0.1 %.

    The misprinted product form fits worse every time.
    """
    alone = (
        {"E": 2.0, "A": 150.0, "alpha": 0.28, "B": 900.0, "beta": 0.30},
        {"E": 2.6, "A": 90.0, "alpha": 0.25, "B": 300.0, "beta": 0.25},
    )
    truth = {"C": 0.15, "A": 60.0, "alpha": 0.30, "B": 120.0, "beta": 0.28}
    columns = design(N=np.geomspace(8e6, 6.7e9, 6), D=np.geomspace(5e9, 1e11, 5))
    both = {"N": columns["N"], "D_i": columns["D"] / 2, "D_j": columns["D"] / 2}
    offset = mean_alone(alone, Points(both, np.ones(30)))
    clean = INTERACTION.predict(truth, columns=columns, offset=offset)
    hits, rejected = dict.fromkeys(truth, 0), 0
    for seed in range(SEEDS):
        first, second = (
            planted(CHINCHILLA, law, columns=columns, noise=0.001, seed=3 * seed + side)
            for side, law in enumerate(alone)
        )
        noise = 0.001 * np.random.default_rng(3 * seed + 2).normal(size=len(clean))
        together = Points(both, clean * np.exp(noise))
        pair = fit_pair((first, second), together, grid=SMALL_GRID, resamples=100)
        for name, (low, high) in intervals(INTERACTION.natural(pair.resampled)).items():
            hits[name] += low <= truth[name] <= high
        rejected += pair.product.objective > 1.5 * pair.together.objective
    assert min(hits.values()) >= ENOUGH, hits
    assert rejected == SEEDS
