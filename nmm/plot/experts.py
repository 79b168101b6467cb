"""Who takes what: a panel for every layer of experts, and above them how they specialise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nmm.plot import BLACK, COLOURS, save

COLUMNS = 4
MOST_NUMBERED = 16  # experts whose numbers have room below a panel


@dataclass(frozen=True)
class LayerOfExperts:
    """What the experts of a layer took of all tokens: by modality a fraction for every expert."""

    fractions: Mapping[str, Sequence[float]]
    dropped_fraction: float


@dataclass(frozen=True)
class Scores:
    """Specialisation layer by layer on one kind of documents; None where it has one modality."""

    specialisation: Sequence[float | None]
    normalised: Sequence[float | None]


def expert_figure(
    layers: Sequence[LayerOfExperts], *, scores: Mapping[str, Scores], title: str, path: Path
) -> None:
    """A bar is an expert: as high as its part of all tokens, coloured by their modality.

    Bars are in the order of their modalities' shares, and have the experts' numbers; the dotted
    line is an even load. Scores are by kind of documents.
    """
    down = -(-len(layers) // COLUMNS)
    figure = Figure(figsize=(3.1 * COLUMNS, 2.7 + 2.1 * down), layout="constrained")
    heights = (2.7, 2.1 * down)
    top, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    figure.suptitle(title)
    above = top.subplots()
    _draw_scores(above, scores)
    panels = below.subplots(down, COLUMNS, squeeze=False, sharey=True).flatten()
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    for number, (panel, layer) in enumerate(zip(panels, layers, strict=False)):
        _draw_layer(panel, layer, number=number)
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("part of all tokens")
    handles, labels = panels[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, axes=(above, *panels), path=path)


def _draw_scores(axes: Axes, scores: Mapping[str, Scores]) -> None:
    colours = (BLACK, *COLOURS[2:])  # the first two are those of text and images below
    shown = {kind: each for kind, each in scores.items() if set(each.specialisation) != {None}}
    for (kind, each), colour in zip(shown.items(), colours, strict=False):
        for values, style, more in (
            (each.specialisation, "o-", ""),
            (each.normalised, "s:", ", as if modalities were equally many"),
        ):
            heights = [np.nan if value is None else value for value in values]
            line = {"color": colour, "label": kind + more, "markersize": 4, "linewidth": 1.3}
            axes.plot(range(len(heights)), heights, style, **line)
    axes.set(xlabel="layer", ylabel="specialisation", ylim=(-0.04, 1.04))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if shown:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_layer(axes: Axes, layer: LayerOfExperts, *, number: int) -> None:
    fractions = np.array(list(layer.fractions.values()))  # [modalities, experts]
    loads = fractions.sum(axis=0)
    experts = len(loads)
    shares = fractions / np.where(loads > 0, loads, 1)
    order = np.lexsort((-loads, *-shares[::-1]))
    bottom = np.zeros(experts)
    for name, values, colour in zip(layer.fractions, fractions[:, order], COLOURS, strict=False):
        axes.bar(range(experts), values, 0.86, bottom=bottom, color=colour, label=name)
        bottom += values
    axes.axhline(loads.sum() / experts, color=BLACK, linestyle=":", linewidth=1, label="even load")
    numbered = experts <= MOST_NUMBERED
    axes.set_xticks(range(experts) if numbered else [], order if numbered else [])
    dropped = f", no expert for {layer.dropped_fraction:.0%}" if layer.dropped_fraction else ""
    axes.set_title(f"layer {number}{dropped}", fontsize=10)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
