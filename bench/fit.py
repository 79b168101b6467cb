"""How fast laws are fitted: 4,500 starts and 4,000 resamples, against a loop of scipy's and a peer.

    python -m bench.fit [--table tests/tables/chinchilla.csv] [--sample 200] [--repeats 5]
    bench/install.sh                # once: the environment of the package `chinchilla`
    python -m bench.fit --peer bench/.venv-chinchilla/bin/python

The same data, grid and objective for all, and CPU time of one core beside the clock, which other
programs disturb. The loop is that of the public notebook (arXiv 2404.10102): scipy's L-BFGS-B with
numeric gradients from one start after the other. It and the peer are run on a part of the starts,
and their time for all is in proportion.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from bench.processes import measured
from nmm.scaling.bootstrap import bootstrap
from nmm.scaling.files import csv_text
from nmm.scaling.fit import fit_law, model_of
from nmm.scaling.laws import CHINCHILLA, EPOCH_GRID
from nmm.scaling.points import Points
from nmm.scaling.reference import minimise_lbfgs
from nmm.scaling.table import read_points, read_rows

COLUMNS = {"N": "Model Size", "C": "Training FLOP", "L": "loss"}
DELTA = 1e-3
GRID = EPOCH_GRID
GRID_STARTS = 4500


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", type=Path, default=Path("tests/tables/chinchilla.csv"))
    parser.add_argument("--sample", type=int, default=200, help="starts of the scipy loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="that has `chinchilla`")
    options = parser.parse_args()
    points = read_points(read_rows(options.table), columns=COLUMNS, needed=("N", "D"), source="")
    points = points.select(np.sort(np.argsort(points.loss)[:-5]))
    ours = compare(points, sample=options.sample, repeats=options.repeats)
    if options.peer is not None:
        compare_peer(points, ours=ours, python=options.peer)


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock and of the CPU."""

    clock: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.clock:8.3f} s, {self.cpu:8.3f} s of CPU"


def compare(points: Points, *, sample: int, repeats: int) -> Spent:
    """Our times, which are returned, and those of scipy's loops."""
    fit = fit_law(CHINCHILLA, points, delta=DELTA, grid=GRID)
    ours = clocked(lambda: fit_law(CHINCHILLA, points, delta=DELTA, grid=GRID), repeats=repeats)
    resampled = clocked(lambda: bootstrap(fit, points, resamples=4000), repeats=repeats)
    print(f"{len(points)} points, {fit.starts.count:,} starts, medians of {repeats}")
    print(f"batched solver   {ours}   {fit.objective:.10e}   {fit.starts.at_best_fraction:.1%}")
    print(f"4,000 resamples  {resampled}")
    print(f"together         {Spent(ours.clock + resampled.clock, ours.cpu + resampled.cpu)}")
    chosen = np.random.default_rng(0).choice(fit.starts.count, size=sample, replace=False)
    starts = GRID.starts(CHINCHILLA)[chosen]
    for name, loop in (("exact gradients", exact), ("numeric gradients", numeric)):
        objectives = np.empty(0)

        def search(loop: Callable[[Points, np.ndarray], np.ndarray] = loop) -> None:
            nonlocal objectives
            objectives = loop(points, starts)

        spent = clocked(search, repeats=1)
        best = objectives.min()
        print(
            f"scipy, {name}: {said(spent, starts=sample, ours=ours)}; best {best:.10e}, "
            f"{np.mean(objectives < fit.objective * (1 + 1e-6)):.1%} at the optimum, "
            f"{np.mean(objectives < fit.objective * 1.01):.1%} within 1 %"
        )
    return ours


def compare_peer(points: Points, *, ours: Spent, python: Path) -> None:
    """The package on a part of the grid; its parameters are judged by the same objective."""
    part = {"e": (0.0, 0.5), "a": (5, 10, 15, 20), "b": (5, 10, 15, 20)}
    part |= {"alpha": (0.5, 1.0), "beta": (0.5, 1.0)}
    starts = int(np.prod([len(values) for values in part.values()]))
    columns = {"C": 6 * points.columns["N"] * points.columns["D"], **points.columns}
    rows = [
        dict(zip((*columns, "loss"), row, strict=True))
        for row in zip(*(c.tolist() for c in columns.values()), points.loss.tolist(), strict=True)
    ]
    with tempfile.TemporaryDirectory() as directory:
        table, grid = Path(directory, "points.csv"), Path(directory, "starts.json")
        table.write_text(csv_text(rows))
        grid.write_text(json.dumps(part))
        command = [str(python), "-m", "bench.peers.chinchilla", str(table), str(grid)]
        found, _ = measured(command)
    spent = Spent(found["seconds"], found["cpu_seconds"])
    model = model_of(CHINCHILLA, points, delta=DELTA)
    theta = model.centred(CHINCHILLA.theta(found["parameters"]))[None]
    objective = model.losses(theta).sum()
    print(
        f"chinchilla 0.2.0, all cores: {said(spent, starts=starts, ours=ours)}; "
        f"best {objective:.10e}"
    )


def said(spent: Spent, *, starts: int, ours: Spent) -> str:
    """What that many starts took, for all of them and against ours."""
    factor = GRID_STARTS / starts
    return (
        f"{spent.clock * factor:.0f} s, {spent.cpu * factor:.0f} s of CPU for all starts by "
        f"{starts} of them, {1000 * spent.cpu / starts:.1f} ms of CPU a start, "
        f"{spent.cpu * factor / ours.cpu:.0f} times ours"
    )


def clocked(work: Callable[[], object], *, repeats: int) -> Spent:
    """Medians."""
    clocks, cpus = [], []
    for _ in range(repeats):
        clock, cpu = time.perf_counter(), time.process_time()
        work()
        clocks.append(time.perf_counter() - clock)
        cpus.append(time.process_time() - cpu)
    return Spent(median(clocks), median(cpus))


def exact(points: Points, starts: np.ndarray) -> np.ndarray:
    """The reference solver of nmm/scaling, which has exact gradients and a scaled objective."""
    model = model_of(CHINCHILLA, points, delta=DELTA)
    return minimise_lbfgs(model, model.centred(starts)).objective


def numeric(points: Points, starts: np.ndarray) -> np.ndarray:
    """As published: log-sum-exp, the sum of Huber, no gradient given."""
    log_size, log_tokens = np.log(points.columns["N"]), np.log(points.columns["D"])
    log_loss = np.log(points.loss)

    def objective(theta: np.ndarray) -> float:
        e, a, alpha, b, beta = theta
        terms = [a - alpha * log_size, b - beta * log_tokens, np.full_like(log_size, e)]
        residual = np.abs(logsumexp(np.stack(terms), axis=0) - log_loss)
        huber = np.where(residual < DELTA, residual**2 / 2, DELTA * (residual - DELTA / 2))
        return float(huber.sum())

    logs = starts.copy()
    logs[:, 0] = np.log(logs[:, 0])
    return np.array([minimize(objective, start, method="L-BFGS-B").fun for start in logs])


if __name__ == "__main__":
    main()
