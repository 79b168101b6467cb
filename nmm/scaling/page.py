"""Sections of the report on laws of N and D: one for every fit, and what they have in common."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from typing import Any

import numpy as np

from nmm.plot import scaling as draw
from nmm.plot.scaling import LawPicture
from nmm.scaling.allocation import Accounting, numeric_optimum
from nmm.scaling.bootstrap import intervals
from nmm.scaling.files import Record, Written
from nmm.scaling.floor import to_print
from nmm.scaling.frontier import line_of, line_record
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.pieces import (
    Figures,
    Section,
    csv_rows,
    doubts,
    evidence,
    judged_values,
    metrics_table,
    number,
    parameters_table,
    readable,
    residual_html,
    residuals_of,
    table,
)
from nmm.scaling.printed import PRINTED, PRINTED_METRICS

BAND_POINTS = 30
BEYOND = 100  # times the largest C up to which best splits are drawn
NAMES = ("E", "A", "alpha", "B", "beta", "a", "b", "c", "d", "k")


@dataclass(frozen=True)
class Chapter:
    """A fit with its picture; `family` is the name that the user gave its directory."""

    family: str
    written: Written
    picture: LawPicture
    frontier: Record

    @property
    def name(self) -> str:
        """ "early: text"."""
        return f"{self.family}: {readable(self.written.title)}"

    @property
    def loss(self) -> str:
        """ "loss" or "loss/kind/text"."""
        return self.written.title.rpartition(", ")[2]


def chapter(family: str, written: Written, *, least_flops: float = 0.0) -> Chapter:
    """What is drawn of a fit of the chinchilla law; raises UserError where no frontier is left."""
    points, parameters = written.points, written.record["parameters"]
    accounting = Accounting(**written.record["accounting"])
    found = line_record(
        line_of(flops=points["C"], loss=points["L"], size=points["N"], least_flops=least_flops)
    )
    picture = LawPicture(
        title=f"{family}: {readable(written.title)}",
        sizes=points["N"],
        tokens=points["D"],
        residuals=residuals_of(points, flops=points["C"]),
        predict=lambda n, d: CHINCHILLA.predict(parameters, columns={"N": n, "D": d}),
        optimum=lambda c: numeric_optimum(parameters, flops=c, accounting=accounting),
        tokens_at=lambda c, n: accounting.tokens(flops=c, size=n),
        k=found["k"],
        c=found["c"],
        hull=np.array(found["hull"]),
        parabolas=[(p["flops"], p["size"], p["loss"]) for p in found["isoflop"]],
        band=band(written, accounting=accounting),
    )
    return Chapter(family, written, picture, found)


def band(written: Written, *, accounting: Accounting) -> dict[str, np.ndarray]:
    """Ends of the 95 % intervals of the best N and D for some C; empty without resamples."""
    if not written.resamples:
        return {}
    flops = written.points["C"]
    grid = np.geomspace(flops.min(), flops.max() * BEYOND, BAND_POINTS)
    columns = {name: values[:, None] for name, values in written.resamples.items()}
    spent = np.broadcast_to(grid, (len(columns["E"]), BAND_POINTS))
    found: dict[str, np.ndarray] = {"flops": grid}
    for name, values in zip(
        "ND", numeric_optimum(columns, flops=spent, accounting=accounting), strict=True
    ):
        ends = intervals({str(place): values[:, place] for place in range(BAND_POINTS)})
        found[f"{name}_low"], found[f"{name}_high"] = np.array(list(ends.values())).T
    return found


FIGURES: Sequence[tuple[str, Callable[..., None], str]] = (
    (
        "frontier",
        draw.frontier_figure,
        "Every dot is a run, every thin line what the law says of one size as it sees more tokens. "
        "The dashed line is a power law through the lowest losses of the runs, the full one the "
        "lowest loss that the law allows at each compute, thin where its split is extrapolated. "
        "Hollow dots were held out.",
    ),
    (
        "isoflop",
        draw.isoflop_figure,
        "At a fixed compute a larger model sees fewer tokens. Lines are the law, dots the runs "
        "near that compute, stars the best size by the law, circles the lowest points of parabolas "
        "through the runs.",
    ),
    (
        "contours",
        draw.contour_figure,
        "The law as a map: lighter is lower. Dots are the runs, dotted lines cost the same, and "
        "the path crosses each of them where the loss is lowest.",
    ),
    (
        "optimum",
        draw.optimum_figure,
        "How to split a budget: the best size and the best number of tokens, with 95 % intervals "
        "of the resamples. Runs lie between the least and greatest N and D of the contours above; "
        "beyond those (thin), and right of the dotted line, it is extrapolated.",
    ),
)


def chapter_section(one: Chapter, *, figures: Figures) -> Section:
    """A fit: its doubts, parameters, metrics and figures."""
    record = one.written.record
    drawn = [
        figures.add(partial(function, one.picture), name=name, words=words, wide=name == "optimum")
        for name, function, words in FIGURES
    ]
    drawn.insert(3, residual_html(figures, one.picture.residuals))
    shown = {**record, "parameters": {**record["parameters"], **record["exponents"]}}
    html = (
        f"<h2>{escape(one.name)}</h2>{doubts(record)}"
        f"<p>{record['points']} points. {evidence(record)} "
        f"{_exponents(record)}</p>"
        f"{parameters_table({'value': shown}, printed={})}{metrics_table({'law': record})}"
        f"{''.join(drawn)}"
    )
    return Section(html, _rows(one))


def _exponents(record: Record) -> str:
    found = record["regression"]
    if found is None:
        return ""
    return (
        f"The paper's regression of the best splits gives a = {found['a']:.4f}, "
        f"b = {found['b']:.4f}, d = {found['d']:.4f}; the table has the closed form."
    )


def _rows(one: Chapter) -> list[dict[str, Any]]:
    """Every number of the section."""
    record = one.written.record
    values: dict[str, Any] = {**record["parameters"], **record["exponents"]}
    values |= {"k of the runs": one.frontier["k"], "c of the runs": one.frontier["c"]}
    values |= judged_values(record)
    for kind in ("regression", "tokens_per_parameter"):
        part = record[kind] or {}
        values |= {f"{kind.replace('_', ' ')} {name}": value for name, value in part.items()}
    for parabola in one.frontier["isoflop"]:
        values[f"isoFLOP N at {parabola['flops']:.4g}"] = parabola["size"]
    return csv_rows(one.name, values, spread=record["intervals"])


def comparison_section(chapters: Sequence[Chapter], *, figures: Figures) -> Section:
    """Families side by side, for every loss that two of them have."""
    parts = []
    for loss in dict.fromkeys(one.loss for one in chapters):
        families = [one for one in chapters if one.loss == loss]
        if len(families) > 1:
            pictures = [one.picture for one in families]
            words = (
                "The lowest loss at each compute, if size and tokens are split best, of every "
                "family; dots are the lowest losses of its runs. Lower is better; lines that come "
                "closer to each other say that the advantage shrinks. The best split may lie "
                "outside of the runs' sizes and tokens; then a line is an extrapolation (thin), "
                "and dots may lie above it."
            )
            drawn = figures.add(
                partial(draw.comparison_figure, pictures), name="comparison", words=words
            )
            parts.append(
                f'<div class="half"><h3>{escape(readable(loss))}</h3>{drawn}{crossings(families)}'
                "</div>"
            )
    return Section(f"<h2>Families side by side</h2>{''.join(parts)}" if parts else "")


def crossings(families: Sequence[Chapter]) -> str:
    """How the families differ at the ends of their common range of C, in words."""
    low = max(one.picture.flops.min() for one in families)
    high = min(one.picture.flops.max() for one in families)
    if low >= high:
        return "<p>The families have no compute in common, so nothing can be compared.</p>"
    lines = []
    for flops in np.array([[low], [high]]):
        found = []
        for one in families:
            loss = float(one.picture.predict(*one.picture.optimum(flops))[0])
            beyond = "" if one.picture.is_among_runs(flops)[0] else " (extrapolated)"
            found.append((loss, f"{escape(one.name)} {loss:.4f}{beyond}"))
        said = ", ".join(words for _, words in sorted(found))
        lines.append(f"<li>at {flops[0]:.3g} FLOPs: {said}</li>")
    return f"<p>Losses at the best split, lowest first:</p><ul>{''.join(lines)}</ul>"


def coefficients_section(chapters: Sequence[Chapter]) -> Section:
    """All fits beside what the papers print for the same loss."""
    rows: list[list[str]] = []
    grey: list[int] = []
    for loss in dict.fromkeys(one.loss for one in chapters):
        ours = [(one.name, _values(one)) for one in chapters if one.loss == loss]
        rows += [[name, *(number(values.get(key)) for key in NAMES)] for name, values in ours]
        printed = [row for row in PRINTED if row.loss == loss]
        grey += range(len(rows), len(rows) + len(printed))
        rows += [
            [f"in print: {row.family}", *(number(asdict(row)[key]) for key in NAMES)]
            for row in printed
        ]
    errors = [
        [name, f"{mse:.4f}", f"{r2:.4f}", f"{error:.4f}"]
        for name, (mse, r2, error) in PRINTED_METRICS.items()
    ]
    html = (
        "<h2>Coefficients, beside those in print</h2><p>N<sub>opt</sub> ~ C<sup>a</sup>, "
        "D<sub>opt</sub> ~ C<sup>b</sup>, D<sub>opt</sub> ~ N<sub>opt</sub><sup>d</sup>; the "
        "lowest losses of the runs are k C<sup>c</sup>. The c in a fit's own section is another: "
        "the closed form of the law, by which L - E ~ C<sup>c</sup> at the best split.</p><p>Grey "
        "rows are from the papers (arXiv 2504.07951, 2203.15556, 2404.10102), measured on other "
        "data with other tokenizers: compare exponents, not E. 45-45-10 are percent of captions, "
        "interleaved documents and text. Their a, b and d are from regressions, ours are of the "
        "closed form.</p>"
        f"{table(['fit', *NAMES], rows, grey=grey)}"
        "<p>How well the paper's law fits (table 10); ours is in each section.</p>"
        f"{table(['in print', 'MSE', 'R2', 'mean error in %'], errors, grey=range(len(errors)))}"
    )
    return Section(html)


def _values(one: Chapter) -> dict[str, float]:
    record = one.written.record
    found = {**record["parameters"], **record["exponents"]}
    found |= {"E": to_print("E", found["E"]), "c": one.frontier["c"], "k": one.frontier["k"]}
    return found
