"""The parts of the report's page: fits as tables and words, in HTML."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nmm.plot.scaling import LawPicture
from nmm.scaling.files import Record, Written
from nmm.scaling.printed import PRINTED


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


def readable(title: str) -> str:
    """ "model.width 32, loss/kind/text" -> "model.width 32, text"."""
    group, _, loss = title.rpartition(", ")
    loss = loss.removeprefix("loss/kind/")
    return f"{group}, {loss}" if group else loss


def loss_of(one: Chapter) -> str:
    """ "loss" or "loss/kind/text"."""
    return one.written.title.rpartition(", ")[2]


def crossings(families: Sequence[Chapter]) -> str:
    """How the families differ at the ends of their common range of C, in words."""
    low = max(one.picture.flops.min() for one in families)
    high = min(one.picture.flops.max() for one in families)
    if low >= high:
        return "<p>The families have no compute in common, so nothing can be compared.</p>"
    lines = []
    for flops in (low, high):
        losses = {
            one.name: float(one.picture.predict(*one.picture.optimum(np.array([flops])))[0])
            for one in families
        }
        order = sorted(losses, key=lambda name: losses[name])
        said = ", ".join(f"{escape(name)} {losses[name]:.4f}" for name in order)
        lines.append(f"<li>at {flops:.3g} FLOPs: {said}</li>")
    return f"<p>Losses at the best split, lowest first:</p><ul>{''.join(lines)}</ul>"


def table(chapters: Sequence[Chapter]) -> str:
    names = ("E", "A", "alpha", "B", "beta", "a", "b", "c", "d", "k")
    head = "".join(f"<th>{name}</th>" for name in ("fit", *names))
    lines = []
    for loss in dict.fromkeys(loss_of(one) for one in chapters):
        lines += [
            _row(one.name, _values(one), names=names, kind="ours")
            for one in chapters
            if loss_of(one) == loss
        ]
        lines += [
            _row(f"in print: {row.family}", asdict(row), names=names, kind="printed")
            for row in PRINTED
            if row.loss == loss
        ]
    return (
        "<h2>Coefficients, beside those in print</h2><p>N<sub>opt</sub> ~ C<sup>a</sup>, "
        "D<sub>opt</sub> ~ C<sup>b</sup>, D<sub>opt</sub> ~ N<sub>opt</sub><sup>d</sup>; the "
        "lowest losses of the runs are k C<sup>c</sup>.</p><p>Grey rows are from the papers "
        "(arXiv 2504.07951, 2203.15556, 2404.10102), measured on other data with other "
        "tokenizers: compare exponents, not E.</p>"
        f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
    )


def _values(one: Chapter) -> dict[str, float]:
    record = one.written.record
    found = {**record["parameters"], **record["exponents"]}
    return found | {"c": one.frontier["c"], "k": one.frontier["k"]}


def _row(name: str, values: Mapping[str, Any], *, names: Sequence[str], kind: str) -> str:
    cells = "".join(f"<td>{_number(values.get(key))}</td>" for key in names)
    return f'<tr class="{kind}"><td>{escape(name)}</td>{cells}</tr>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def figure(path: Path, *, words: str, wide: bool) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind}><img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


def chapter_text(one: Chapter, *, figures: Sequence[str]) -> str:
    record = one.written.record
    spread = record["intervals"]
    lines = [
        f"<tr><td>{name}</td><td>{value:.6g}</td><td>{_ends(spread.get(name))}</td></tr>"
        for name, value in {**record["parameters"], **record["exponents"]}.items()
    ]
    held_out = record["holdout"]
    judged = [("fitted", record["points"], record["metrics"])]
    if held_out:
        judged += [
            (f"held out ({held_out['rule']})", held_out["points"], held_out["metrics"]),
            ("the same by a straight line", held_out["points"], held_out["naive_metrics"]),
        ]
    metrics = "".join(
        f"<tr><td>{escape(name)}</td><td>{count}</td><td>{found['mse']:.2e}</td>"
        f"<td>{_number(found['r2'])}</td><td>{found['mae_percent']:.3f}</td></tr>"
        for name, count, found in judged
    )
    return (
        f"<h2>{escape(one.name)}</h2>{_doubts(record)}"
        f"<p>{record['points']} points; the objective {record['objective']:.10e} (a sum of Huber, "
        f"delta {record['delta']:g}, on the log of the loss) was found by "
        f"{record['agreement']['at_best_fraction']:.0%} of {record['starts']:,} starts. "
        f"{_exponents(record)}</p>"
        f"<table><tr><th></th><th>value</th><th>95 % interval</th></tr>{''.join(lines)}</table>"
        "<table><tr><th></th><th>points</th><th>MSE</th><th>R2</th><th>mean error in %</th></tr>"
        f"{metrics}</table>{''.join(figures)}"
    )


def _exponents(record: Record) -> str:
    found = record["regression"]
    if found is None:
        return ""
    return (
        f"The paper's regression of the best splits gives a = {found['a']:.4f}, "
        f"b = {found['b']:.4f}, d = {found['d']:.4f}; the table has the closed form."
    )


def _ends(spread: Sequence[float | None] | None) -> str:
    if spread is None:
        return ""
    low, high = ("unknown" if end is None else f"{end:.5g}" for end in spread)
    return f"{low} to {high}"


def _doubts(record: Record) -> str:
    doubts = []
    if not record["agreement"]["confirmed"]:
        doubts.append("Hardly any start but the best ended at this minimum: do not trust it.")
    if record["excluded"]["points"]:
        doubts.append(f"Left out on request: {', '.join(record['excluded']['points'])}.")
    if record["suspects"]:
        doubts.append(f"Far from the law, and kept: {', '.join(record['suspects'][:10])}.")
    if left_out := record.get("left_out"):
        doubts += [f"No point: {name} ({reason})." for name, reason in left_out.items()]
    lines = "".join(f"<li>{escape(doubt)}</li>" for doubt in doubts)
    return f'<ul class="doubt">{lines}</ul>' if lines else ""
