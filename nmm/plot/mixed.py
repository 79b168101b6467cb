"""Pictures of laws beyond N and D: pairs, mixtures, sparsity, repetition, phenomena."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nmm.plot import BLACK, COLOURS, GREY, Paths, save, short_count

Values = np.ndarray


@dataclass(frozen=True)
class PairPicture:
    """Runs of two modalities, float64[n], with the law of their interaction.

    `gain` is the mean loss of two separate models minus the joint loss; `interaction` the law's
    -gain at N and D (tokens of both); `barrier` returns the D at which a model of size N gains.
    """

    sizes: Values
    tokens: Values
    gain: Values
    interaction: Callable[[Values, Values], Values]
    barrier: Callable[[Values], Values]
    cheapest: tuple[float, float] | None  # N, D


def interaction_figure(picture: PairPicture, *, path: Paths) -> None:
    """What a joint model loses or gains against two separate ones, over tokens, by size."""
    figure, axes = _axes()
    tokens = np.geomspace(picture.tokens.min() / 2, picture.tokens.max() * 3, 100)
    sizes = np.unique(picture.sizes)
    shown = sizes[np.unique(np.linspace(0, len(sizes) - 1, len(COLOURS)).round().astype(int))]
    for size, colour in zip(shown, COLOURS, strict=False):
        here = picture.sizes == size
        law = picture.interaction(np.full(100, size), tokens)
        axes.plot(tokens, law, color=colour, linewidth=1.5, label=f"N = {_count(size)}")
        axes.scatter(picture.tokens[here], -picture.gain[here], color=colour, s=18)
    axes.axhline(0, color=BLACK, linewidth=1)
    low, high = axes.get_ylim()
    axes.axhspan(min(low, 0), 0, color=COLOURS[2], alpha=0.08, linewidth=0)
    axes.set_ylim(low, high)
    axes.set(xlabel="tokens D of both modalities", ylabel="joint loss - mean of two models (nats)")
    _counts(axes, x=True)
    axes.legend(frameon=False, fontsize=8)
    save(figure, axes=[axes], path=path)


def barrier_figure(picture: PairPicture, *, path: Paths) -> None:
    """Where together is better than apart: the barrier over N and D, its cheapest point, the runs.

    Full dots gained, hollow ones lost.
    """
    figure, axes = _axes()
    n_low, n_high = picture.sizes.min() / 2, picture.sizes.max() * 2
    d_low, d_high = picture.tokens.min() / 2, picture.tokens.max() * 2
    if picture.cheapest is not None:
        size, tokens = picture.cheapest
        n_low, n_high = min(n_low, size / 4), max(n_high, size * 4)
        d_low, d_high = min(d_low, tokens / 4), max(d_high, tokens * 4)
        sizes = np.geomspace(n_low, n_high, 400)
        needed = picture.barrier(sizes)
        known = np.isfinite(needed)
        axes.plot(needed[known], sizes[known], color=COLOURS[2], linewidth=2, label="barrier")
        axes.fill_betweenx(sizes[known], needed[known], d_high * 10, color=COLOURS[2], alpha=0.08)
        equal = size * tokens / sizes
        axes.plot(equal, sizes, ":", color=GREY, label=f"C = {6 * size * tokens:.2g} FLOPs")
        axes.plot(tokens, size, "*", color=COLOURS[1], markersize=14, label="its cheapest point")
    gains = picture.gain > 0
    for chosen, face, name in ((gains, COLOURS[2], "gained"), (~gains, "none", "lost")):
        if chosen.any():
            axes.scatter(
                picture.tokens[chosen],
                picture.sizes[chosen],
                s=22,
                facecolors=face,
                edgecolors=BLACK,
                linewidths=0.8,
                label=f"runs that {name}",
                zorder=3,
            )
    axes.set(xlabel="tokens D of both modalities", ylabel="parameters N")
    _counts(axes, x=True, y=True)
    axes.set(xlim=(d_low, d_high), ylim=(n_low, n_high))
    axes.legend(fontsize=8)
    save(figure, axes=[axes], path=path)


def shares_figure(
    losses: Mapping[str, Callable[[Values], Values]], *, best: Mapping[str, float], path: Paths
) -> None:
    """Losses while one domain's share goes from 0 to 1 and the others keep their proportions.

    `losses` take shares [n, domains]; `best` are the shares through which all lines go.
    """
    domains = list(best)
    figure = Figure(figsize=(3.1 * len(domains), 3.4), layout="constrained")
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    middle = np.array([best[name] for name in domains])
    varied = np.linspace(0.005, 0.995, 150)
    for place, axes in enumerate(panels):
        rest = np.delete(middle, place)
        rest = rest / rest.sum() if rest.sum() > 0 else np.full(len(rest), 1 / len(rest))
        shares = np.insert(np.outer(1 - varied, rest), place, varied, axis=1)
        for (name, loss), colour in zip(losses.items(), _colours(losses), strict=True):
            width = 2.4 if name == "weighted mean" else 1.4
            axes.plot(varied, loss(shares), color=colour, linewidth=width, label=name)
        axes.axvline(middle[place], color=GREY, linestyle=":", linewidth=1)
        axes.set(xlabel=f"share of {domains[place]}", xlim=(0, 1))
    panels[0].set_ylabel("loss (nats per token)")
    panels[-1].legend(frameon=False, fontsize=8)
    save(figure, axes=list(panels), path=path)


def _colours(losses: Mapping[str, object]) -> list[str]:
    """Black for the mean, which is the one to look at."""
    others = iter(COLOURS * (1 + len(losses) // len(COLOURS)))
    return [BLACK if name == "weighted mean" else next(others) for name in losses]


def triangle_figure(
    loss: Callable[[Values], Values],
    *,
    domains: Sequence[str],
    runs: Values,
    best: Values,
    path: Paths,
) -> None:
    """The loss over all mixtures of three domains; `runs` [m, 3] and `best` [3] are shares."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
    steps = 60
    grid = np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)])
    shares = np.clip(grid / steps, 1e-4, None)
    shares = shares / shares.sum(1, keepdims=True)
    heights = loss(shares)
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    levels = np.quantile(heights, np.linspace(0, 0.97, 16))
    x, y = (shares @ corners).T
    shades = axes.tricontourf(
        x, y, heights, levels=np.unique(levels), cmap="viridis_r", extend="max"
    )
    figure.colorbar(shades, ax=axes, label="weighted mean loss (nats per token)", format="%.3f")
    axes.plot(*np.vstack([corners, corners[:1]]).T, color=BLACK, linewidth=1)
    mixtures = np.unique(runs.round(4), axis=0)
    axes.scatter(*(mixtures @ corners).T, s=22, color="white", edgecolors=BLACK, label="runs")
    axes.plot(*(best @ corners), "*", color=COLOURS[1], markersize=15, label="best", linestyle="")
    for name, corner, side in zip(domains, corners, ("top", "top", "bottom"), strict=True):
        offset = -0.03 if side == "top" else 0.03
        axes.text(corner[0], corner[1] + offset, name, ha="center", va=side, fontsize=10)
    axes.set(xlim=(-0.08, 1.08), ylim=(-0.1, 0.96), aspect="equal")
    axes.axis("off")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, axes=[], path=path)


def lines_figure(
    lines: Sequence[tuple[str, Values, Values]],
    *,
    dots: Sequence[tuple[Values, Values]] = (),
    xlabel: str,
    ylabel: str,
    path: Paths,
    log: str = "",
    diagonal: bool = False,
) -> None:
    """Named lines (name, x, y), dots (x, y) in their colours; `log` names logarithmic axes."""
    figure, axes = _axes()
    for place, (name, x, y) in enumerate(lines):
        axes.plot(x, y, color=COLOURS[place % len(COLOURS)], linewidth=1.8, label=name)
    for place, (x, y) in enumerate(dots):
        axes.scatter(x, y, color=COLOURS[place % len(COLOURS)], s=18)
    if diagonal:
        ends = np.array([lines[0][1].min(), lines[0][1].max()])
        axes.plot(ends, ends, ":", color=GREY, label="worth as much as new tokens")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    for wanted, scale, axis in (
        ("x" in log, axes.set_xscale, axes.xaxis),
        ("y" in log, axes.set_yscale, axes.yaxis),
    ):
        if wanted:
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8)
    save(figure, axes=[axes], path=path)


def dynamics_figure(
    sizes: Values,
    *,
    paused: Mapping[str, Values],
    alternations: Values,
    spike_rate: Values,
    path: Paths,
) -> None:
    """Pauses of each modality, how often they alternate, and gradient spikes, over N by run."""
    figure = Figure(figsize=(9.3, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (name, values), marker, colour in zip(paused.items(), "o+", COLOURS, strict=False):
        size = 60 if marker == "+" else 24
        left.scatter(
            sizes, values, color=colour, s=size, marker=marker, label=f"{name} pauses", zorder=3
        )
    left.set(ylabel="fraction of windows", ylim=(-0.03, 1.03))
    left.legend(frameon=False, fontsize=8)
    middle.scatter(sizes, alternations, color=COLOURS[2], s=24)
    middle.set(ylabel="alternations per window")
    right.scatter(sizes, spike_rate, color=COLOURS[3], s=24)
    right.set(ylabel="gradient spikes per logged step")
    for axes, values in ((middle, alternations), (right, spike_rate)):
        axes.set_ylim(0, 1.15 * values.max() or 1)
    for axes in (left, middle, right):
        axes.set_xlabel("parameters N")
        _counts(axes, x=True)
    save(figure, axes=[left, middle, right], path=path)


def batch_figure(scans: Sequence[tuple[str, Values, Values, float | None]], *, path: Paths) -> None:
    """Loss against tokens per step with a parabola through each scan; (name, x, y, best x)."""
    figure, axes = _axes()
    for (name, x, y, best), colour in zip(scans, _cycled(len(scans)), strict=True):
        logs = np.log(x)
        parabola = np.polyfit(logs - logs.mean(), y, 2)
        fine = np.linspace(logs.min(), logs.max(), 100)
        axes.plot(np.exp(fine), np.polyval(parabola, fine - logs.mean()), color=colour, label=name)
        axes.scatter(x, y, color=colour, s=20)
        if best is not None:
            height = np.polyval(parabola, np.log(best) - logs.mean())
            axes.plot(best, height, "*", color=colour, markersize=13)
    axes.set(xlabel="tokens per step", ylabel="loss (nats per token)")
    _counts(axes, x=True)
    axes.legend(frameon=False, fontsize=8)
    save(figure, axes=[axes], path=path)


def _count(value: float) -> str:
    """242_012_000 -> "242M"."""
    return short_count(float(f"{value:.3g}"))


def _cycled(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    return figure, figure.subplots()


def _counts(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    """Logarithmic, with 1B for a billion."""
    for wanted, scale, axis in ((x, axes.set_xscale, axes.xaxis), (y, axes.set_yscale, axes.yaxis)):
        if wanted:
            scale("log")
            axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
            axis.set_minor_formatter(NullFormatter())
