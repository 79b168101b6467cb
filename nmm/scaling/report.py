"""One page that says what a study found: laws, frontiers, best splits, and how far to trust them.

`report` writes DIR/report.html (all in one file), DIR/figures/*.svg and *.png, and DIR/report.csv
with every number of the page.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nmm.errors import UserError
from nmm.plot import scaling as draw
from nmm.plot.scaling import LawPicture
from nmm.scaling.allocation import Accounting, numeric_optimum
from nmm.scaling.bootstrap import intervals
from nmm.scaling.files import Written, csv_text, write_text
from nmm.scaling.frontier import line_of, line_record
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.page import Chapter, chapter_text, crossings, figure, loss_of, readable, table

CSS = Path(__file__).with_name("page.css")
BAND_POINTS = 30
BEYOND = 100  # times the largest C up to which best splits are drawn


def chapter(family: str, written: Written, *, least_flops: float = 0.0) -> Chapter:
    """What is drawn of a fit; raises UserError for a law that is not one of N and D."""
    if written.record["law"] != "chinchilla":
        raise UserError(
            f"{family} holds the law {written.record['law']}; the report is about chinchilla laws."
        )
    points, parameters = written.points, written.record["parameters"]
    accounting = Accounting(**written.record["accounting"])
    found = line_record(
        line_of(flops=points["C"], loss=points["L"], size=points["N"], least_flops=least_flops)
    )
    unseen = points["predicted_unseen"]
    held_out = np.isfinite(unseen)
    picture = LawPicture(
        title=f"{family}: {readable(written.title)}",
        sizes=points["N"],
        tokens=points["D"],
        flops=points["C"],
        losses=points["L"],
        predicted=np.where(held_out, unseen, points["predicted"]),
        held_out=held_out,
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
        "lowest loss that the law allows at each compute. Hollow dots were held out.",
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
        "residuals",
        draw.residual_figure,
        "What the law gets wrong. Hollow dots were predicted by a fit that had not seen them.",
    ),
    (
        "optimum",
        draw.optimum_figure,
        "How to split a budget: the best size and the best number of tokens, with 95 % intervals "
        "of the resamples. Right of the dotted line there are no runs.",
    ),
)


def report(chapters: Sequence[Chapter], *, out: Path) -> None:
    """Write page, figures and numbers."""
    pages = []
    for place, one in enumerate(chapters):
        figures = []
        for name, function, words in FIGURES:
            path = out / "figures" / f"{place + 1:02d}_{name}.svg"
            function(one.picture, path=path)
            function(one.picture, path=path.with_suffix(".png"))
            figures.append(figure(path, words=words, wide=name in ("residuals", "optimum")))
        pages.append(chapter_text(one, figures=figures))
    head = _head(chapters, out=out)
    body = "\n".join([head, table(chapters), *pages])
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Scaling laws</title>\n'
        f"<style>\n{CSS.read_text()}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    write_text(out / "report.csv", csv_text(rows(chapters)))
    write_text(out / "report.html", page)


def _head(chapters: Sequence[Chapter], *, out: Path) -> str:
    total = sum(one.written.record["points"] for one in chapters)
    text = (
        "<h1>Scaling laws</h1><p>Each fit describes the held-out loss L of a model of N parameters "
        "that has seen D tokens by <b>L = E + A/N<sup>&alpha;</sup> + B/D<sup>&beta;</sup></b>: E "
        "is what no model of this kind gets below, the other two terms are the price of a small "
        "model and of little data. Losses are nats per token; C are training FLOPs. "
        f"{len(chapters)} fits, {total:,} points.</p>"
    )
    families = _one_loss(chapters)
    if len(families) > 1:
        path = out / "figures" / "00_comparison.svg"
        draw.comparison_figure([one.picture for one in families], path=path)
        draw.comparison_figure([one.picture for one in families], path=path.with_suffix(".png"))
        words = (
            "The lowest loss at each compute, if size and tokens are split best, of every family; "
            "dots are the lowest losses of its runs. Lower is better; lines that come closer to "
            "each other say that the advantage shrinks."
        )
        text += f"<h2>Families side by side</h2>{figure(path, words=words, wide=True)}"
        text += crossings(families)
    return text


def _one_loss(chapters: Sequence[Chapter]) -> list[Chapter]:
    """The chapters of the first one's loss."""
    return [one for one in chapters if loss_of(one) == loss_of(chapters[0])]


def rows(chapters: Sequence[Chapter]) -> list[dict[str, Any]]:
    """Every number of the page: fit, quantity, value and, where there is one, its interval."""
    found = []
    for one in chapters:
        record, spread = one.written.record, one.written.record["intervals"]
        values: dict[str, Any] = {**record["parameters"], **record["exponents"]}
        values |= {"k of the runs": one.frontier["k"], "c of the runs": one.frontier["c"]}
        values |= {key: record[key] for key in ("objective", "points", "starts")}
        for kind, part in (
            ("fitted", record["metrics"]),
            ("held out", (record["holdout"] or {}).get("metrics", {})),
            ("straight line", (record["holdout"] or {}).get("naive_metrics", {})),
            ("regression", record["regression"] or {}),
            ("tokens per parameter", record["tokens_per_parameter"] or {}),
        ):
            values |= {f"{kind} {name}": value for name, value in part.items()}
        for name, value in values.items():
            low, high = spread.get(name, (None, None))
            found.append(
                {"fit": one.name, "quantity": name, "value": value, "low": low, "high": high}
            )
        for parabola in one.frontier["isoflop"]:
            name = f"isoFLOP N at {parabola['flops']:.4g}"
            found.append({"fit": one.name, "quantity": name, "value": parabola["size"]})
    return found
