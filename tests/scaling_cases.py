"""Published tables and planted laws for the tests of nmm/scaling."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nmm.scaling.bootstrap import resample
from nmm.scaling.fit import DELTA, AnyLaw, fit_law
from nmm.scaling.laws import CHINCHILLA, Grid, Law
from nmm.scaling.points import Points
from nmm.scaling.powers import PowerModel
from nmm.scaling.smooth import SmoothModel
from nmm.scaling.solve import DONE_RESAMPLED, minimise

TABLES = Path(__file__).parent / "tables"
SMALL_GRID = Grid((0, 10, 20), (0.1, 0.5), (-0.5, 0.5))  # 72 starts
SEEDS = 100
SIZES = np.array([275e6, 464e6, 932e6, 1.63e9, 2.28e9, 3.35e9])  # of arXiv 2504.07951
NMM = {"E": 1.904, "A": 260.0, "alpha": 0.301, "B": 1800.0, "beta": 0.335}


def published(name: str, *, size: str, tokens: str = "", flops: str = "", loss: str) -> Points:
    """A table of tests/tables by its columns; without tokens D = C / 6N."""
    with (TABLES / name).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    column = {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}
    D = column[tokens] if tokens else column[flops] / (6 * column[size])  # noqa: N806
    names = tuple(f"row {place}" for place in range(1, len(rows) + 1))
    return Points({"N": column[size], "D": D}, column[loss], names)


def chinchilla(*, dropped: int = 5) -> Points:
    """The replication's points without the highest losses."""
    points = published("chinchilla.csv", size="Model Size", flops="Training FLOP", loss="loss")
    return points.select(np.sort(np.argsort(points.loss)[: len(points) - dropped]))


def gemstone(name: str) -> Points:
    return published(
        f"gemstone_{name}.csv", size="params_active_precise", tokens="tokens", loss="final_loss"
    )


def design(**columns: np.ndarray) -> dict[str, np.ndarray]:
    """Every combination of the values."""
    grids = np.meshgrid(*columns.values(), indexing="ij")
    return {name: grid.ravel() for name, grid in zip(columns, grids, strict=True)}


def planted(
    law: AnyLaw,
    truth: Mapping[str, float],
    *,
    columns: Mapping[str, np.ndarray],
    noise: float,
    seed: int = 0,
) -> Points:
    """Points of the law with normal noise of that standard deviation on the log of the loss."""
    loss = law.predict(truth, columns=columns)
    rng = np.random.default_rng(seed)
    names = tuple(f"row {place}" for place in range(1, len(loss) + 1))
    return Points(columns, loss * np.exp(noise * rng.normal(size=len(loss))), names)


def covered(
    law: AnyLaw,
    truth: Mapping[str, float],
    *,
    columns: Mapping[str, np.ndarray],
    noise: float,
    resamples: int,
) -> dict[str, int]:
    """For every parameter, in how many of SEEDS its 95 % interval holds the truth.

    All seeds are fitted at once, each from every start, and then all their resamples, each from
    the fit of its seed.
    """
    losses = np.stack(
        [planted(law, truth, columns=columns, noise=noise, seed=s).loss for s in range(SEEDS)]
    )
    whole = many(law, columns=columns, losses=losses)
    starts = whole.begin(whole.centred(starts_of(law, columns=columns, loss=losses[0])))
    ends = minimise(
        whole, np.tile(starts, (SEEDS, 1)), problems=np.repeat(np.arange(SEEDS), len(starts))
    )
    best = ends.objective.reshape(SEEDS, -1).argmin(1)
    theta = ends.theta.reshape(SEEDS, len(starts), -1)[np.arange(SEEDS), best]
    counts = [resample(losses.shape[1], resamples=resamples, seed=seed) for seed in range(SEEDS)]
    again = many(
        law,
        columns=columns,
        losses=np.repeat(losses, resamples, axis=0),
        weights=np.concatenate(counts),
    )
    resampled = minimise(
        again,
        np.repeat(theta, resamples, axis=0),
        problems=np.arange(SEEDS * resamples),
        done=DONE_RESAMPLED,
    )
    found = law.natural(again.uncentred(resampled.theta).reshape(SEEDS, resamples, -1))
    return {name: _hits(values, truth=truth[name]) for name, values in found.items()}


def _hits(values: np.ndarray, *, truth: float) -> int:
    low, high = np.quantile(values, [0.025, 0.975], axis=1)
    return int(((low <= truth) & (truth <= high)).sum())


def many(
    law: AnyLaw,
    *,
    columns: Mapping[str, np.ndarray],
    losses: np.ndarray,
    weights: np.ndarray | None = None,
) -> PowerModel | SmoothModel:
    """The objective of many data sets on one design: losses and weights are [Q, n]."""
    kind = PowerModel if isinstance(law, Law) else SmoothModel
    return kind(law, columns=columns, loss=losses, delta=DELTA, weights=weights)


def starts_of(law: AnyLaw, *, columns: Mapping[str, np.ndarray], loss: np.ndarray) -> np.ndarray:
    """As `fit_law` starts, on a smaller grid."""
    if isinstance(law, Law):
        return SMALL_GRID.starts(law)
    return law.starts(fit_law(CHINCHILLA, Points(columns, loss), grid=SMALL_GRID).parameters)
