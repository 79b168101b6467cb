"""Pictures of scaling laws, each a pure function of points and of a law given as functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from nmm.plot import BLACK, COLOURS, DASHES, Paths, save, short_count

GREY = "#999999"
GRID = 160  # points along a side of the contours
MOST_SIZES = 12  # curves that are drawn and named; more are joined to shades

Values = np.ndarray


@dataclass(frozen=True)
class Residuals:
    """Measured and predicted losses, float64[n]; `held_out` bool[n] were predicted unseen."""

    flops: Values
    losses: Values
    predicted: Values
    held_out: Values


@dataclass(frozen=True)
class LawPicture:
    """A fitted law with its points, all float64[n]; functions take and return arrays.

    `band` has for each C of `flops` the ends of the 95 % intervals of N and D, if there are some.
    """

    title: str
    sizes: Values
    tokens: Values
    residuals: Residuals
    predict: Callable[[Values, Values], Values]  # N, D -> loss
    optimum: Callable[[Values], tuple[Values, Values]]  # C -> N, D
    tokens_at: Callable[[Values, Values], Values]  # C, N -> D
    k: float
    c: float
    hull: Values  # [m, 2]: C and loss
    parabolas: Sequence[tuple[float, float, float]] = field(default=())  # C, N, loss
    band: Mapping[str, Values] = field(default_factory=dict)  # flops, N_low, N_high, D_low, D_high

    @property
    def flops(self) -> Values:
        return self.residuals.flops

    @property
    def losses(self) -> Values:
        return self.residuals.losses

    def is_among_runs(self, flops: Values) -> Values:
        """bool[n]: do C and its best N and D lie between the least and the greatest of the runs?"""
        beside = zip(
            (flops, *self.optimum(flops)), (self.flops, self.sizes, self.tokens), strict=True
        )
        return np.all([(x >= runs.min()) & (x <= runs.max()) for x, runs in beside], axis=0)


def frontier_figure(picture: LawPicture, *, path: Paths) -> None:
    """Loss against FLOPs: a curve of the law for every size, the runs, and the frontier."""
    figure, axes = _axes()
    colours = _by_size(figure, axes, picture=picture)
    for size in _named_sizes(picture):
        here = picture.sizes == size
        flops = np.geomspace(picture.flops[here].min(), picture.flops[here].max(), 50)
        losses = picture.predict(np.full(50, size), picture.tokens_at(flops, np.full(50, size)))
        axes.plot(flops, losses, color=colours(size), linewidth=1)
    _runs(axes, picture, x=picture.flops, colours=colours)
    flops = np.geomspace(picture.flops.min(), 3 * picture.flops.max(), 100)
    axes.plot(flops, picture.k * flops**picture.c, color=BLACK, linewidth=2, linestyle="--")
    axes.plot(*picture.hull.T, color=BLACK, marker=".", linestyle="")
    words = f"L = {picture.k:.4g} C^{picture.c:.4f}"
    axes.plot([], [], color=BLACK, linestyle="--", label=f"frontier of the runs, {words}")
    line = picture.predict(*picture.optimum(flops))
    _thin_beyond_runs(axes, picture, flops=flops, line=line, color=COLOURS[1])
    axes.plot([], [], color=COLOURS[1], label="frontier of the law")
    axes.set(xlabel="training FLOPs", ylabel="loss (nats per token)")
    log_axes(axes, x=True, y=True)
    axes.legend(frameon=False, fontsize=8)
    save(figure, axes=[axes], path=path)


def isoflop_figure(picture: LawPicture, *, path: Paths) -> None:
    """Loss against N at fixed C by the law, the runs near them, and lowest points."""
    figure, axes = _axes()
    low, high = np.quantile(picture.flops, [0.1, 0.98])
    levels = np.geomspace(low, high, len(COLOURS))
    sizes = np.geomspace(picture.sizes.min() / 2, picture.sizes.max() * 2, 200)
    width = np.log(levels[1] / levels[0]) / 2
    for level, colour in zip(levels, COLOURS, strict=True):
        tokens = picture.tokens_at(np.full(200, level), sizes)
        near = np.abs(np.log(picture.flops / level)) < min(width, 0.15)
        axes.plot(sizes, picture.predict(sizes, tokens), color=colour, label=f"C = {level:.2g}")
        axes.scatter(picture.sizes[near], picture.losses[near], color=colour, s=14)
        size, best = picture.optimum(np.array([level]))
        axes.plot(size, picture.predict(size, best), "*", color=colour, markersize=11)
    for _, size, loss in picture.parabolas:
        axes.plot(size, loss, "o", color="none", markeredgecolor=BLACK, markersize=6)
    if picture.parabolas:
        axes.plot([], [], "o", color="none", markeredgecolor=BLACK, label="lowest of a parabola")
    axes.plot([], [], "*", color=GREY, label="optimum of the law")
    highest = picture.predict(picture.sizes, picture.tokens).max()
    axes.set_ylim(top=min(highest, axes.get_ylim()[1]))
    axes.set(xlabel="parameters N", ylabel="loss (nats per token)")
    log_axes(axes, x=True, counts=True)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    save(figure, axes=[axes], path=path)


def contour_figure(picture: LawPicture, *, path: Paths) -> None:
    """L(N, D) as contours, the runs on it, lines of equal C, and the optimal path."""
    figure, axes = _axes()
    sizes = np.geomspace(picture.sizes.min() / 2, picture.sizes.max() * 3, GRID)
    tokens = np.geomspace(picture.tokens.min() / 2, picture.tokens.max() * 3, GRID)
    across, up = np.meshgrid(tokens, sizes)
    losses = picture.predict(up.ravel(), across.ravel()).reshape(up.shape)
    shades = axes.contourf(across, up, losses, levels=18, cmap="viridis_r", alpha=0.8)
    axes.contour(across, up, losses, levels=18, colors="white", linewidths=0.4)
    figure.colorbar(shades, ax=axes, label="loss (nats per token)")
    decades = np.log10([picture.flops.min() / 10, picture.flops.max() * 10])
    for level in 10.0 ** np.arange(np.floor(decades[0]), np.ceil(decades[1]) + 1):
        line = picture.tokens_at(np.full(GRID, level), sizes)
        inside = (line > tokens[0]) & (line < tokens[-1])
        axes.plot(line[inside], sizes[inside], color=BLACK, linewidth=0.8, linestyle=":")
    axes.scatter(
        picture.tokens, picture.sizes, s=10, color="white", edgecolors=BLACK, linewidths=0.5
    )
    size, best = picture.optimum(
        np.geomspace(picture.flops.min() / 10, picture.flops.max() * 100, 100)
    )
    inside = (best > tokens[0]) & (best < tokens[-1]) & (size > sizes[0]) & (size < sizes[-1])
    axes.plot(best[inside], size[inside], color=COLOURS[1], linewidth=2.5, label="optimal path")
    axes.plot([], [], color=BLACK, linewidth=0.8, linestyle=":", label="equal FLOPs, tenfold apart")
    axes.set(xlabel="tokens D", ylabel="parameters N")
    log_axes(axes, x=True, y=True, counts=True)
    axes.legend(fontsize=8)
    save(figure, axes=[axes], path=path)


def optimum_figure(picture: LawPicture, *, path: Paths) -> None:
    """N_opt and D_opt against C with their 95 % intervals, two decades beyond the runs."""
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    flops = np.geomspace(picture.flops.min(), picture.flops.max() * 100, 100)
    both = picture.optimum(flops)
    for axes, values, name, colour in zip(panels, both, "ND", COLOURS, strict=False):
        _thin_beyond_runs(axes, picture, flops=flops, line=values, color=colour)
        if picture.band:
            ends = picture.band[f"{name}_low"], picture.band[f"{name}_high"]
            axes.fill_between(picture.band["flops"], *ends, color=colour, alpha=0.2, linewidth=0)
        axes.axvline(picture.flops.max(), color=GREY, linestyle=":", linewidth=1)
        axes.set(xlabel="training FLOPs", ylabel="best N" if name == "N" else "best D in tokens")
        log_axes(axes, x=True, y=True)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    if picture.parabolas:
        c, n, _ = np.array(picture.parabolas).T
        panels[0].plot(c, n, "o", color="none", markeredgecolor=BLACK, label="by parabolas")
        panels[0].legend(frameon=False, fontsize=8)
    save(figure, axes=panels, path=path)


def residual_figure(picture: Residuals, *, path: Paths) -> None:
    """Error of the predicted loss against measured loss and against FLOPs; held-out runs hollow."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    error = 100 * (picture.predicted / picture.losses - 1)
    for axes, x in zip(panels, (picture.losses, picture.flops), strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8)
        for chosen, style, name in (
            (~picture.held_out, {"color": COLOURS[0]}, "fitted"),
            (picture.held_out, {"facecolors": "none", "edgecolors": COLOURS[1]}, "held out"),
        ):
            if chosen.any():
                axes.scatter(x[chosen], error[chosen], s=18, label=name, **style)
    panels[0].set(xlabel="measured loss (nats per token)", ylabel="predicted - measured (%)")
    panels[1].set(xlabel="training FLOPs", xscale="log")
    panels[1].xaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, axes=panels, path=path)


def comparison_figure(pictures: Sequence[LawPicture], *, path: Paths) -> None:
    """The frontiers of several families on one axis: of their laws, and the lowest runs."""
    figure, axes = _axes()
    for place, picture in enumerate(pictures):
        colour = COLOURS[place % len(COLOURS)]
        flops = np.geomspace(picture.flops.min(), picture.flops.max() * 10, 100)
        style = DASHES[place // len(COLOURS) % len(DASHES)]
        line = picture.predict(*picture.optimum(flops))
        _thin_beyond_runs(axes, picture, flops=flops, line=line, color=colour, linestyle=style)
        axes.plot([], [], color=colour, linestyle=style, label=picture.title)
        axes.plot(*picture.hull.T, color=colour, marker=".", linestyle="")
    axes.set(xlabel="training FLOPs", ylabel="loss at the best split (nats per token)")
    log_axes(axes, x=True, y=True)
    axes.legend(frameon=False, fontsize=8)
    save(figure, axes=[axes], path=path)


def _thin_beyond_runs(
    axes: Axes, picture: LawPicture, *, flops: Values, line: Values, **style: Any
) -> None:
    """A line that is thick where the best split lies among the runs."""
    axes.plot(flops, line, **style, linewidth=0.8)
    axes.plot(flops, np.where(picture.is_among_runs(flops), line, np.nan), **style, linewidth=2.5)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    return figure, figure.subplots()


def _named_sizes(picture: LawPicture) -> np.ndarray:
    """Sizes with more than one run, the largest MOST_SIZES of them."""
    sizes, counts = np.unique(picture.sizes, return_counts=True)
    return sizes[counts > 1][-MOST_SIZES:]


def _by_size(figure: Figure, axes: Axes, *, picture: LawPicture) -> Callable[[float], str]:
    """A shade for each size, and the scale of the shades."""
    low, high = picture.sizes.min(), picture.sizes.max()
    scale = LogNorm(low, high if high > low else 2 * low)
    shades = ScalarMappable(scale, colormaps["viridis"])
    bar = figure.colorbar(shades, ax=axes, label="parameters N")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return lambda size: to_hex(shades.to_rgba(np.array([size]))[0])


def _runs(
    axes: Axes,
    picture: LawPicture,
    *,
    x: Values,
    colours: Callable[[float], str],
) -> None:
    """Measured losses by size; held-out ones hollow."""
    edges = [colours(size) for size in picture.sizes]
    faces = [
        edge if not out else "none"
        for edge, out in zip(edges, picture.residuals.held_out, strict=True)
    ]
    axes.scatter(x, picture.losses, s=16, facecolors=faces, edgecolors=edges, linewidths=1)


def log_axes(axes: Axes, *, x: bool = False, y: bool = False, counts: bool = False) -> None:
    """Logarithmic axes whose numbers can be read; `counts` writes them as 1B."""
    if x:
        axes.set_xscale("log")
    if y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 1000 * low:
            several = LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8))
            axes.yaxis.set_major_locator(several if high > 3 * low else MaxNLocator(6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if counts:
        shown = FuncFormatter(lambda value, _: short_count(value))
        for axis in ([axes.xaxis] if x else []) + ([axes.yaxis] if y else []):
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            axis.set_major_formatter(shown)
            axis.set_minor_formatter(NullFormatter())
