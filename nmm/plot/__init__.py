"""Every picture we draw, each as a pure function of rows or configs; Agg only, no pyplot state.

python -m nmm.plot --run runs/X                               writes runs/X/loss.png
python -m nmm.plot --schedules docs/figures/schedules.svg     draws the cooldown shapes
"""

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nmm.config.schedule import Cooldown, ScheduleConfig
from nmm.errors import UserError
from nmm.log import read_losses, read_rows
from nmm.schedule import cooldown_factor, learning_rate, phase_name, phases

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
BLACK, GREY = "#222222", "#888888"
Paths = Path | Sequence[Path]
TEXT_LINES = 12
EXAMPLE_MINIMUM = 0.01


def loss_figure(rows: list[dict], *, evals: list[dict], path: Path) -> None:
    """Loss over tokens (raw light, mean dark, held-out as points) above the learning rate.

    `rows` and `evals` are the lines of losses.jsonl and evals.jsonl (docs/scaling.md). There is
    a line for the loss of each source, and for each modality once more than one has a loss.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    sources = _names(rows, prefix="loss/source/")
    modalities = _names(rows, prefix="loss/modality/")
    colours = dict(zip(sources, _cycle(len(sources)), strict=True))
    for name, colour in colours.items():
        _curve(top, rows, key=f"loss/source/{name}", label=name, colour=colour)
    if len(modalities) > 1:
        for name, colour in zip(modalities, reversed(_cycle(len(modalities))), strict=True):
            key = f"loss/modality/{name}"
            _curve(top, rows, key=key, label=f"{name} tokens", colour=colour, style="--")
    # Its raw curve shows little but which documents a step happened to hold.
    _curve(top, rows, key="loss", label="all", colour=BLACK, raw=False)
    held_out = "loss/source/" if _names(evals, prefix="loss/source/") else "loss/kind/"
    for name in _names(evals, prefix=held_out):
        label = f"{name}, held out"
        _points(top, evals, key=held_out + name, label=label, colour=colours.get(name, BLACK))
    top.set_ylabel("loss (nats per token)")
    _log_if_wide(top)
    top.legend(frameon=False, ncols=2)
    tokens, rates = _series(rows, key="lr")
    bottom.plot(tokens, rates, color=BLACK)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("tokens")
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    save(figure, axes=(top, bottom), path=path)


def schedule_figure(path: Path) -> None:
    """A whole default run on the left, every cooldown shape on the right."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    config = ScheduleConfig(total_steps=8500)
    plan = phases(config, tokens_per_step=1)
    steps = range(1, plan.total_steps + 1)
    rates = [learning_rate(config, phases=plan, peak=1.0, step=step) for step in steps]
    left.plot(steps, rates, color=BLACK, linewidth=2)
    ends = (0, plan.warmup_steps, plan.warmup_steps + plan.constant_steps, plan.total_steps)
    for start, end in pairwise(ends):
        left.text((start + end) / 2, 1.06, phase_name(plan, step=end), ha="center")
        if end < plan.total_steps:
            left.axvline(end, color="#bbbbbb", linestyle=":", linewidth=1)
    left.set(xlabel="step", ylabel="fraction of the peak", ylim=(0, 1.16))
    left.set_title(f"defaults for a run of {plan.total_steps:,} steps")
    times = [index / 1000 for index in range(1001)]
    for cooldown, colour, style in zip(Cooldown, COLOURS, DASHES, strict=False):
        needs_minimum = cooldown in (Cooldown.inverse_sqrt_published, Cooldown.exponential)
        minimum = EXAMPLE_MINIMUM if needs_minimum else 0.0
        shape = ScheduleConfig(total_steps=1, cooldown=cooldown, min_fraction=minimum)
        label = cooldown.name + (f" (to {minimum})" if minimum else "")
        factors = [cooldown_factor(shape, time=time) for time in times]
        right.plot(times, factors, color=colour, linestyle=style, linewidth=2, label=label)
    right.set(xlabel="fraction of the cooldown", ylim=(0, 1.16), title="shapes of the cooldown")
    right.legend(frameon=False)
    save(figure, axes=(left, right), path=path)


@dataclass(frozen=True)
class Panel:
    """Pictures uint8[side, side, 3] beside each other, and below them texts in their colours."""

    pictures: Sequence[np.ndarray]
    texts: Sequence[tuple[str, str]]


def picture_figure(panels: Sequence[Panel], path: Path) -> None:
    """Panels in a grid of four columns."""
    columns = 4
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is drawn as a box
        figure.savefig(path, dpi=100)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    across = math.ceil(math.sqrt(len(panel.pictures))) or 1
    down = -(-len(panel.pictures) // across)
    for number, picture in enumerate(panel.pictures):
        row, column = divmod(number, across)
        box = (column, column + 0.97, row + 0.97, row)
        axis.imshow(picture, interpolation="nearest", extent=box)
    axis.set(xlim=(0, across), ylim=(down or 1, 0), aspect="equal", anchor="NW")
    where = {"xy": (0, -0.02 if panel.pictures else 1), "xycoords": "axes fraction"}
    for text, colour in panel.texts:
        said = _shortened(fill(_printable(text), width=34))
        offset = {"xytext": (0, -3), "textcoords": "offset points"}
        drawn = axis.annotate(said, **where, **offset, va="top", color=colour)
        where = {"xy": (0, 0), "xycoords": drawn}


def _shortened(text: str) -> str:
    """At most TEXT_LINES lines; what is left out is an ellipsis."""
    lines = text.split("\n")
    return text if len(lines) <= TEXT_LINES else "\n".join(lines[:TEXT_LINES]) + " …"


def _printable(text: str) -> str:
    """Control characters, which a model may write, as dots; "$" would begin a formula."""
    return "".join(c if c.isprintable() else "·" for c in text).replace("$", r"\$")


def short_count(value: float) -> str:
    """1_500_000 -> "1.5M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def running_mean(values: Sequence[float], *, window: int) -> np.ndarray:
    """Mean over `window` values around each, fewer at the ends; as long as `values`."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    middle = np.arange(len(values))
    first = np.maximum(0, middle - (window - 1) // 2)
    last = np.minimum(len(values), middle + window // 2 + 1)
    return (sums[last] - sums[first]) / (last - first)


def _curve(
    axes: Axes,
    rows: list[dict],
    *,
    key: str,
    label: str,
    colour: str,
    style: str = "-",
    raw: bool = True,
) -> None:
    tokens, losses = _series(rows, key=key)
    if not tokens:
        return
    smooth = running_mean(losses, window=1 + len(losses) // 40)
    if raw:
        axes.plot(tokens, losses, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(tokens, smooth, color=colour, linewidth=1.8, linestyle=style, label=label)


def _points(axes: Axes, rows: list[dict], *, key: str, label: str, colour: str) -> None:
    tokens, losses = _series(rows, key=key)
    if tokens:
        marker = {"marker": "o", "markersize": 7, "markeredgecolor": "white"}
        axes.plot(tokens, losses, linestyle="", color=colour, label=label, zorder=3, **marker)


def _log_if_wide(axes: Axes) -> None:
    """Logarithmic when the losses span a factor of four or more; a short run stays linear."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if not 0 < 4 * low <= high:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _series(rows: list[dict], *, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the rows that have a finite value under `key`."""
    found = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
    found = [(tokens, value) for tokens, value in found if math.isfinite(value)]
    return [tokens for tokens, _ in found], [value for _, value in found]


def _names(rows: list[dict], *, prefix: str) -> list[str]:
    """What follows `prefix` in the keys of the rows."""
    return sorted({key[len(prefix) :] for row in rows for key in row if key.startswith(prefix)})


def _cycle(length: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(length)]


def save(figure: Figure, *, axes: Sequence[Axes], path: Paths) -> None:
    """Write .svg or .png, or both, in the house's look; the same figure gives the same bytes."""
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        panel.set_axisbelow(True)
    for one in [path] if isinstance(path, Path) else path:
        one.parent.mkdir(parents=True, exist_ok=True)
        # A fixed salt and no date: the same rows give the same bytes.
        with matplotlib.rc_context({"svg.hashsalt": "nmm"}):
            figure.savefig(one, dpi=150, metadata={"Date": None} if one.suffix == ".svg" else None)
        figure.set_layout_engine("none")  # the second form keeps the places of the first


def _draw_run(run: Path) -> Path:
    rows = read_losses(run)
    path = run / "loss.png"
    loss_figure(rows, evals=read_rows(run / "evals.jsonl"), path=path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nmm.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="DIR", help="draw the curves of this run")
    what.add_argument("--schedules", type=Path, metavar="FILE", help="draw the cooldown shapes")
    arguments = parser.parse_args()
    try:
        if arguments.run is not None:
            print(f"wrote {_draw_run(arguments.run)}")
        else:
            if arguments.schedules.suffix not in (".svg", ".png", ".pdf"):
                raise UserError(f"--schedules is {arguments.schedules}; name a .svg, .png or .pdf.")
            schedule_figure(arguments.schedules)
            print(f"wrote {arguments.schedules}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
