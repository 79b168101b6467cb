"""How fast laws are fitted: 4,500 starts and 4,000 resamples, against a loop of scipy's.

    python -m bench.fit [--table tests/tables/chinchilla.csv] [--sample 200] [--repeats 5]

One process, one thread, the same data, grid and objective for all. The loop is that of the public
notebook (arXiv 2404.10102): scipy's L-BFGS-B with numeric gradients from one start after the other.
It is run on a sample of the starts, and its time for all is that of the sample times their ratio.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from nmm.scaling.bootstrap import bootstrap
from nmm.scaling.fit import fit_law, model_of
from nmm.scaling.laws import CHINCHILLA, EPOCH_GRID
from nmm.scaling.points import Points
from nmm.scaling.reference import minimise_lbfgs
from nmm.scaling.table import read_points, read_rows

COLUMNS = {"N": "Model Size", "C": "Training FLOP", "L": "loss"}
DELTA = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", type=Path, default=Path("tests/tables/chinchilla.csv"))
    parser.add_argument("--sample", type=int, default=200, help="starts of the scipy loop")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    points = read_points(read_rows(options.table), columns=COLUMNS, needed=("N", "D"), source="")
    points = points.select(np.sort(np.argsort(points.loss)[:-5]))
    compare(points, sample=options.sample, repeats=options.repeats)


def compare(points: Points, *, sample: int, repeats: int) -> None:
    grid = EPOCH_GRID
    fit = fit_law(CHINCHILLA, points, delta=DELTA, grid=grid)
    ours = clocked(lambda: fit_law(CHINCHILLA, points, delta=DELTA, grid=grid), repeats=repeats)
    resampled = clocked(lambda: bootstrap(fit, points, resamples=4000), repeats=repeats)
    print(f"{len(points)} points, {fit.starts.count:,} starts, medians of {repeats}")
    print(
        f"batched solver   {ours:8.3f} s   {fit.objective:.10e}   {fit.starts.at_best_fraction:.1%}"
    )
    print(f"4,000 resamples  {resampled:8.3f} s")
    print(f"together         {ours + resampled:8.3f} s")
    chosen = np.random.default_rng(0).choice(fit.starts.count, size=sample, replace=False)
    loops: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "scipy, exact gradients": lambda starts: exact(points, starts),
        "scipy, numeric gradients": lambda starts: numeric(points, starts),
    }
    for name, loop in loops.items():
        objectives, seconds = np.empty(0), 0.0
        started = time.perf_counter()
        objectives = loop(grid.starts(CHINCHILLA)[chosen])
        seconds = (time.perf_counter() - started) * fit.starts.count / sample
        found = np.mean(objectives < fit.objective * (1 + 1e-6))
        near = np.mean(objectives < fit.objective * 1.01)
        print(
            f"{name}: {seconds:.1f} s for all starts by {sample} of them, "
            f"{1000 * seconds / fit.starts.count:.1f} ms a start, {seconds / ours:.0f} times ours; "
            f"best {objectives.min():.10e}, {found:.1%} at the optimum, {near:.1%} within 1 %"
        )


def clocked(work: Callable[[], object], *, repeats: int) -> float:
    """Median seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)


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
