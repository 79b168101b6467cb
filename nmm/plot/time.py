"""Where the time of a run went, over its steps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from nmm.plot import BLACK, COLOURS, GREY, Paths, running_mean, save

COLUMNS = 120  # of the picture at most; rows between are added up


def time_figure(rows: Sequence[dict], *, phases: Sequence[str], path: Paths) -> None:
    """Shares of the phases as bands above the tokens per second.

    `rows` are lines of losses.jsonl with `seconds/PHASE` for every one of `phases`.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    parts = np.array_split(np.arange(len(rows)), min(COLUMNS, len(rows)))
    spent = np.array(
        [[sum(rows[i][f"seconds/{p}"] for i in part) for part in parts] for p in phases]
    )
    shares = spent / spent.sum(axis=0)
    edges = [rows[0]["step"] - 1, *(rows[part[-1]]["step"] for part in parts)]
    low = np.zeros(len(parts))
    colours = [*COLOURS, GREY, BLACK]
    for name, share, colour in zip(phases, shares, colours, strict=False):
        top.stairs(low + share, edges, baseline=low, fill=True, color=colour, label=name)
        low = low + share
    top.set(ylim=(0, 1), ylabel="share of the time")
    top.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    steps, rates = [row["step"] for row in rows], [row["tokens_per_second"] for row in rows]
    bottom.plot(steps, rates, color=COLOURS[0], alpha=0.25, linewidth=0.8)
    bottom.plot(steps, running_mean(rates, window=1 + len(rates) // 40), color=COLOURS[0])
    bottom.set(xlabel="step", ylabel="tokens per second", xlim=(edges[0], edges[-1]))
    bottom.set_ylim(bottom=0)
    save(figure, axes=(top, bottom), path=path)
