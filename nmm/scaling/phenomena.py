"""What training on two modalities looks like in the log (arXiv 2301.03728, section 6).

The paper describes four phenomena without definitions; these are ours, and every number comes with
its settings:

* **pauses**: in a window of steps the loss of one modality falls by less than `least_drop` nats
  while the other's falls by more; and how often the pause passes from one to the other;
* **spikes**: steps whose gradient norm is above median + `spread` * MAD of the steps before;
* their rank correlation with N over runs, and with alpha over pairs of modalities;
* the **best batch** of a size: the lowest point of a parabola through loss against log batch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from nmm.errors import UserError
from nmm.log import Row
from nmm.scaling.runs import Run

CHUNK = 4096  # trailing windows whose medians are taken at a time
PERMUTATIONS = 10_000
SAME_TOKENS = 0.1  # runs of a batch scan have D within this relative distance


@dataclass(frozen=True)
class Settings:
    """Windows are counted in logged rows."""

    window_rows: int = 50
    least_drop: float = 0.01  # nats over a window
    spike_rows: int = 100
    spread: float = 10.0


@dataclass(frozen=True)
class Dynamics:
    """Of one run; fractions are of its windows, `spike_rate` is of its rows."""

    windows: int
    paused_fraction: tuple[float, float]
    alternations: int
    spikes: int
    spike_rate: float


def dynamics(rows: Sequence[Row], *, pair: tuple[str, str], settings: Settings) -> Dynamics:
    """Pauses of two modalities and gradient spikes of a log; raises UserError for a short one."""
    keys = [f"loss/modality/{name}" for name in pair]
    both = [row for row in rows if all(row.get(key) is not None for key in keys)]
    if len(both) < 2 * settings.window_rows:
        raise UserError(
            f"the log has {len(both)} rows with a loss of {pair[0]} and of {pair[1]}, and two "
            f"windows need {2 * settings.window_rows}; log more often, or lower --window."
        )
    steps = np.array([row["step"] for row in both], dtype=float)
    falls = [
        drops(np.array([row[key] for row in both]), steps=steps, window_rows=settings.window_rows)
        for key in keys
    ]
    paused = pauses(falls[0], falls[1], least_drop=settings.least_drop)
    norms = np.array([row["grad_norm"] for row in rows if row.get("grad_norm") is not None])
    found = spikes(norms, rows=settings.spike_rows, spread=settings.spread)
    return Dynamics(
        windows=len(paused),
        paused_fraction=(float(np.mean(paused == 1)), float(np.mean(paused == -1))),
        alternations=alternations(paused),
        spikes=len(found),
        spike_rate=len(found) / max(1, len(norms)),
    )


def drops(losses: np.ndarray, *, steps: np.ndarray, window_rows: int) -> np.ndarray:
    """Nats by which a line through each window falls from its first to its last step."""
    count = len(losses) // window_rows
    shape = (count, window_rows)
    y = losses[: count * window_rows].reshape(shape)
    x = steps[: count * window_rows].reshape(shape)
    centred = x - x.mean(1, keepdims=True)
    slope = (centred * y).sum(1) / np.square(centred).sum(1)
    return -slope * (x[:, -1] - x[:, 0])


def pauses(first: np.ndarray, second: np.ndarray, *, least_drop: float) -> np.ndarray:
    """1 where only the second modality learns, -1 where only the first does, else 0."""
    learns = first > least_drop, second > least_drop
    return (learns[1] & ~learns[0]).astype(int) - (learns[0] & ~learns[1]).astype(int)


def alternations(paused: np.ndarray) -> int:
    """How often the pause passes to the other modality; windows without one do not count."""
    return int(np.sum(np.diff(paused[paused != 0]) != 0))


def spikes(norms: np.ndarray, *, rows: int, spread: float) -> np.ndarray:
    """Places of values above median + spread * MAD of the `rows` values before them."""
    if len(norms) <= rows:
        return np.empty(0, dtype=int)
    windows = np.lib.stride_tricks.sliding_window_view(norms[:-1], rows)
    found = []
    for first in range(0, len(windows), CHUNK):
        part = windows[first : first + CHUNK]
        middle = np.median(part, axis=1)
        mad = np.median(np.abs(part - middle[:, None]), axis=1)
        places = first + rows + np.arange(len(part))
        found.append(places[norms[places] > middle + spread * mad])
    return np.concatenate(found)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho, and the chance of one as large if the order were random."""

    rho: float
    p: float
    points: int


def correlation(first: np.ndarray, second: np.ndarray) -> Correlation | None:
    """Of the ranks; None with fewer than three points, or where one of both never varies."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    x, y = (_standardised(ranks(values)) for values in (first, second))
    rho = float(np.mean(x * y))
    shuffled = np.random.default_rng(0).permuted(np.tile(y, (PERMUTATIONS, 1)), axis=1)
    as_large = np.abs(shuffled @ x / len(x)) >= abs(rho) - 1e-12
    return Correlation(rho, float((as_large.sum() + 1) / (PERMUTATIONS + 1)), len(x))


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


@dataclass(frozen=True)
class BestBatch:
    """The lowest point of loss against log batch; None outside of the batches that were tried."""

    size: int
    tokens: int
    batches_tokens: tuple[float, ...]
    losses: tuple[float, ...]
    best_tokens: float | None


def best_batches(runs: Sequence[Run], *, loss: str) -> list[BestBatch]:
    """For every size and number of tokens that was trained with three batches or more."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: (run.size, run.tokens)):
        if loss not in run.losses:
            continue
        first = groups[-1][0] if groups else None
        same = first is not None and run.size == first.size
        if first is not None and same and run.tokens <= (1 + SAME_TOKENS) * first.tokens:
            groups[-1].append(run)
        else:
            groups.append([run])
    found = [_best_batch(group, loss=loss) for group in groups]
    return [best for best in found if best is not None]


def _best_batch(runs: Sequence[Run], *, loss: str) -> BestBatch | None:
    batches = np.array([run.tokens / run.manifest["total_steps"] for run in runs])
    losses = np.array([run.losses[loss] for run in runs])
    order = np.argsort(batches)
    x, y = np.log(batches[order]), losses[order]
    if len(np.unique(np.round(x, 2))) < 3:
        return None
    return BestBatch(
        size=runs[0].size,
        tokens=runs[0].tokens,
        batches_tokens=tuple(batches[order].tolist()),
        losses=tuple(y.tolist()),
        best_tokens=lowest_point(x, y),
    )


def lowest_point(logs: np.ndarray, losses: np.ndarray) -> float | None:
    """exp of where a parabola through the losses is lowest; None outside of the logs, in order."""
    bend, slope, _ = np.polyfit(logs - logs.mean(), losses, 2)
    lowest = logs.mean() - slope / (2 * bend) if bend > 0 else np.inf
    return float(np.exp(lowest)) if logs[0] <= lowest <= logs[-1] else None


def summary(found: Sequence[tuple[Run, Dynamics]]) -> dict[str, object]:
    """Every run's numbers, and their correlations with N over the runs."""
    sizes = np.array([float(run.size) for run, _ in found])
    measures = {
        "paused": np.array([sum(one.paused_fraction) for _, one in found]),
        "alternations": np.array([one.alternations / one.windows for _, one in found]),
        "spike_rate": np.array([one.spike_rate for _, one in found]),
    }
    with_size = {name: correlation(sizes, values) for name, values in measures.items()}
    return {
        "runs": [{"run": str(run.directory), "N": run.size, **asdict(one)} for run, one in found],
        "means": {name: float(values.mean()) for name, values in measures.items()},
        "with_N": {name: one and asdict(one) for name, one in with_size.items()},
    }
