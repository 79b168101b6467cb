"""Pieces of the report's page that every section is made of: tables, figures, doubts, in HTML."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nmm.plot.scaling import Residuals, residual_figure
from nmm.scaling.files import Record
from nmm.scaling.floor import to_print

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page, and the rows of report.csv with every number of it."""

    html: str
    rows: list[Row] = field(default_factory=list)


@dataclass
class Figures:
    """Draws into one folder, both forms of every figure, numbered in the order of the page."""

    folder: Path
    drawn: int = 0

    def add(self, draw: Callable[..., None], *, name: str, words: str, wide: bool = False) -> str:
        """`draw` takes paths; the HTML of the figure with its words."""
        path = self.folder / f"{self.drawn:02d}_{name}.svg"
        self.drawn += 1
        draw(path=[path, path.with_suffix(".png")])
        data = base64.b64encode(path.read_bytes()).decode()
        kind = ' class="wide"' if wide else ""
        return (
            f'<figure{kind}><img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )


def readable(title: str) -> str:
    """ "model.width 32, loss/kind/text" -> "model.width 32, text"."""
    group, _, loss = title.rpartition(", ")
    loss = loss.removeprefix("loss/kind/").removeprefix("loss/modality/")
    return f"{group}, {loss}" if group else loss


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def ends(spread: Sequence[float | None] | None, *, of: str = "") -> str:
    """ "0.1 to 0.3", of the parameter of that name."""
    if spread is None:
        return ""
    low, high = ("unknown" if end is None else f"{to_print(of, end):.4g}" for end in spread)
    return f"{low} to {high}"


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    grey: Sequence[int] = (),
    of_words: bool = False,
) -> str:
    """Cells are text; the rows at the places of `grey` are what somebody else printed."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    kinds = ["", *(' class="printed"' if place in grey else "" for place in range(len(rows)))]
    body = "".join(f"<tr{kind}>{line}</tr>" for kind, line in zip(kinds, lines, strict=True))
    kind = ' class="words"' if of_words else ""
    return f'<div class="scroll"><table{kind}>{body}</table></div>'


def parameters_table(
    fits: Mapping[str, Record], *, printed: Mapping[str, Mapping[str, float]]
) -> str:
    """Parameters down, fits across with their intervals, and what papers print beside them."""
    names = list(next(iter(fits.values()))["parameters"])
    intervals = any(fit["intervals"] for fit in fits.values())
    head = ["", *(h for name in fits for h in ([name, "95 % interval"] if intervals else [name]))]
    rows = []
    for parameter in names:
        row = [parameter]
        for fit in fits.values():
            row.append(f"{to_print(parameter, fit['parameters'][parameter]):.6g}")
            row += [ends(fit["intervals"].get(parameter), of=parameter)] * intervals
        rows.append([*row, *(number(values.get(parameter)) for values in printed.values())])
    return table([*head, *(f"in print: {name}" for name in printed)], rows)


def metrics_table(fits: Mapping[str, Record]) -> str:
    """MSE, R2 and mean error of the fitted and of the held-out points."""
    rows = []
    for name, fit in fits.items():
        rows.append(_judged(f"{name}, fitted", fit["points"], fit["metrics"]))
        if held_out := fit.get("holdout"):
            count = held_out["points"]
            what = f"{name}, held out ({held_out['rule']})"
            rows.append(_judged(what, count, held_out["metrics"]))
            rows.append(_judged("the same by a straight line", count, held_out["naive_metrics"]))
    return table(["", "points", "MSE", "R2", "mean error in %"], rows)


def _judged(name: str, count: int, found: Mapping[str, float | None]) -> list[str]:
    mse, error = found["mse"], found["mae_percent"]
    assert mse is not None, name
    return [name, f"{count:,}", f"{mse:.2e}", number(found["r2"]), f"{error:.3f}"]


def evidence(record: Record) -> str:
    """The objective and how many searches found it, as a sentence."""
    return (
        f"The objective {record['objective']:.10e}, a sum of Huber's loss on the logarithms of the "
        f"losses, which turns linear at {record['delta']:g} (delta), was found by "
        f"{record['agreement']['at_best_fraction']:.0%} of {record['starts']:,} starts."
    )


def doubts(record: Record) -> str:
    """What a reader must know before trusting a fit."""
    found = []
    if not record["agreement"]["confirmed"]:
        found.append("Hardly any start but the best ended at this minimum: do not trust it.")
    if not record.get("has_floor", True):
        found.append(
            "E is 0 as far as these points tell: their losses still fall as powers, and no floor "
            "is in sight."
        )
    if record["excluded"]["points"]:
        found.append(f"Left out on request: {', '.join(record['excluded']['points'])}.")
    if record["suspects"]:
        found.append(f"Far from the law, and kept: {', '.join(record['suspects'][:10])}.")
    if left_out := record.get("left_out"):
        found += [f"No point: {name} ({reason})." for name, reason in left_out.items()]
    lines = "".join(f"<li>{escape(doubt)}</li>" for doubt in found)
    return f'<ul class="doubt">{lines}</ul>' if lines else ""


def residuals_of(columns: Mapping[str, np.ndarray], *, flops: np.ndarray) -> Residuals:
    """Of the columns of a table of points."""
    unseen = columns["predicted_unseen"]
    held_out = np.isfinite(unseen)
    return Residuals(
        flops=flops,
        losses=columns["L"],
        predicted=np.where(held_out, unseen, columns["predicted"]),
        held_out=held_out,
    )


def residual_html(figures: Figures, residuals: Residuals, *, of: str = "the law") -> str:
    return figures.add(
        lambda path: residual_figure(residuals, path=path),
        name="residuals",
        words=f"What {of} gets wrong. Hollow dots were predicted by a fit that had not seen them.",
    )


def csv_rows(
    fit: str, values: Mapping[str, Any], *, spread: Mapping[str, Sequence[float | None]]
) -> list[Row]:
    """A row of report.csv for every value, with its interval where there is one."""
    found = []
    for name, value in values.items():
        low, high = spread.get(name, (None, None))
        found.append({"fit": fit, "quantity": name, "value": value, "low": low, "high": high})
    return found


def judged_values(record: Record) -> Row:
    """Objective, counts and metrics of a fit by the names of report.csv."""
    values: Row = {key: record[key] for key in ("objective", "points", "starts")}
    held_out = record.get("holdout") or {}
    for kind, part in (
        ("fitted", record["metrics"]),
        ("held out", held_out.get("metrics", {})),
        ("straight line", held_out.get("naive_metrics", {})),
    ):
        values |= {f"{kind} {name}": value for name, value in part.items()}
    return values
