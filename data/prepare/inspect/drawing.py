"""Small pictures as HTML: colours, and histograms as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil

import numpy as np

from nmm.plot import COLOURS

WIDTH, HEIGHT, MARGIN = 420, 110, 18


def colour(source: int) -> str:
    """A colour for each source; after the first six, darker ones."""
    again, place = divmod(source, len(COLOURS))
    return COLOURS[place] if not again % 2 else mixed(COLOURS[place], 0, strength=0.5)


def tint(source: int, *, strength: float = 0.35) -> str:
    """The colour of a source, mixed with white."""
    return mixed(colour(source), 255, strength=strength)


def mixed(colour: str, grey: int, *, strength: float) -> str:
    """`strength` of a colour, the rest grey: 0 is black, 255 white."""
    return "#" + "".join(f"{round(grey + (c - grey) * strength):02x}" for c in rgb(colour))


def rgb(colour: str) -> tuple[int, int, int]:
    """ "#0072B2" -> (0, 114, 178)"""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


@dataclass(frozen=True)
class Axis:
    """Maps values to [0, WIDTH]; logarithmic for values above 0 that span a factor of 8 or more."""

    low: float
    high: float
    log: bool

    @staticmethod
    def of(values: Sequence[np.ndarray]) -> "Axis":
        low = min(float(array.min()) for array in values if len(array))
        high = max(float(array.max()) for array in values if len(array))
        return Axis(low, max(high, low + 1), log=low > 0 and high >= 8 * low)

    def at(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.log:
            low, high, here = np.log([low, high, value]).tolist()
        return WIDTH * (here - low) / (high - low)

    def edges(self, bins: int) -> np.ndarray:
        """Borders of `bins` bars of equal width."""
        spread = np.geomspace if self.log else np.linspace
        return spread(self.low, self.high, bins + 1)

    def ticks(self) -> list[float]:
        """Round numbers on the axis, at most 8: powers of two if it is logarithmic."""
        if self.log:
            powers = (2.0**power for power in range(64))
            inside = [value for value in powers if self.low <= value <= self.high]
            return inside[:: -(-len(inside) // 8)]
        steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
        step = next(step for step in steps if (self.high - self.low) / step <= 7)
        return [float(n * step) for n in range(ceil(self.low / step), int(self.high / step) + 1)]


def histogram(
    values: np.ndarray, axis: Axis, *, colour: str, bins: int = 40, limit: float | None = None
) -> str:
    """Bars of how many values fall where, with a dashed line at `limit` if it is on the axis."""
    counts, edges = np.histogram(values, axis.edges(bins))
    bars = [
        (axis.at(left), axis.at(right), count)
        for left, right, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    ]
    labels = [(axis.at(tick), f"{tick:,.0f}") for tick in axis.ticks()]
    dashed = limit is not None and axis.low <= limit <= axis.high
    return _bars(bars, labels, colour=colour, line=axis.at(limit) if dashed and limit else None)


def bars_of_counts(values: np.ndarray, *, most: int, colour: str) -> str:
    """One bar for each of 0 .. most; what is above `most` is added to the last bar."""
    counts = np.bincount(np.minimum(values, most), minlength=most + 1).tolist()
    width = min(40.0, WIDTH / len(counts))
    bars = [(n * width, (n + 1) * width, count) for n, count in enumerate(counts)]
    every = -(-len(counts) // 12)
    labels = [((n + 0.5) * width, str(n)) for n in range(0, len(counts), every)]
    if values.max(initial=0) > most:
        labels[-1] = (labels[-1][0], f"{labels[-1][1]}+")
    return _bars(bars, labels, colour=colour, line=None)


def _bars(
    bars: list[tuple[float, float, int]],
    labels: list[tuple[float, str]],
    *,
    colour: str,
    line: float | None,
) -> str:
    highest = max(count for _, _, count in bars) or 1
    shapes = [
        f'<rect x="{left:.1f}" y="{HEIGHT - high:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
        f'height="{high:.1f}" fill="{colour}"><title>{count:,}</title></rect>'
        for left, right, count in bars
        if count and (high := max(HEIGHT * count / highest, 1.0))
    ]
    if line is not None:
        shapes.append(f'<line class="limit" x1="{line:.1f}" x2="{line:.1f}" y2="{HEIGHT}"/>')
    texts = [
        f'<text x="{x:.1f}" y="{HEIGHT + 14}" text-anchor="middle">{escape(label)}</text>'
        for x, label in labels
    ]
    box = f"-{MARGIN} 0 {WIDTH + 2 * MARGIN} {HEIGHT + 20}"
    base = f'<line class="base" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>'
    return f'<svg viewBox="{box}">{"".join(shapes)}{base}{"".join(texts)}</svg>'


def chip(source: int, name: str = "") -> str:
    """A square in the colour of a source, and its name."""
    return f'<i class="chip" style="background:{colour(source)}"></i>{escape(name)}'


def fraction(value: float, *, digits: int = 3) -> str:
    """0.5 -> "50.000 %"."""
    return f"{100 * value:.{digits}f} %"
