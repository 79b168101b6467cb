"""Sections of the report on two modalities in one model: their laws, synergy, the barrier."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from nmm.errors import UserError
from nmm.plot.mixed import PairPicture, barrier_figure, interaction_figure
from nmm.scaling.files import FIT_MIXED, PAIR_POINTS, Record
from nmm.scaling.laws import INTERACTION
from nmm.scaling.pieces import (
    Figures,
    Row,
    Section,
    csv_rows,
    doubts,
    evidence,
    judged_values,
    metrics_table,
    number,
    parameters_table,
    residual_html,
    residuals_of,
    table,
)
from nmm.scaling.printed import PRINTED_ALONE, PRINTED_BARRIER
from nmm.scaling.words import no_barrier


@dataclass(frozen=True)
class PairFit:
    """What `fit-mixed` wrote; columns of `together` are those of its points with both."""

    family: str
    record: Record
    together: Mapping[str, np.ndarray]

    @property
    def names(self) -> tuple[str, str]:
        first, second = self.record["pair"]
        return first, second


def read_pair(family: str, directory: Path) -> PairFit:
    try:
        record = json.loads((directory / FIT_MIXED).read_text())
        with (directory / PAIR_POINTS).open(newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["trained_on"] == "both"]
        numbers = [key for key in rows[0] if key not in ("trained_on", "point")]
        together = {key: np.array([float(row[key] or "nan") for row in rows]) for key in numbers}
        _ = record["pair"], together["mean_alone"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise UserError(
            f"{directory} has no readable {FIT_MIXED} with {PAIR_POINTS}; write both with "
            f"`python -m nmm.scaling fit-mixed ... --out {directory}`."
        ) from None
    return PairFit(family, record, together)


def picture_of(one: PairFit) -> PairPicture:
    p, cheapest = one.record["parameters"], one.record["barrier"]
    together = one.together

    def needed(sizes: np.ndarray) -> np.ndarray:
        """The D at which a size gains; no number for one that never does."""
        left = p["C"] - p["A"] * sizes ** -p["alpha"]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(left > 0, (p["B"] / np.abs(left)) ** (1 / p["beta"]), np.nan)

    return PairPicture(
        sizes=together["N"],
        tokens=together["D_i"] + together["D_j"],
        gain=together["mean_alone"] - together["L"],
        interaction=lambda n, d: INTERACTION.predict(p, columns={"N": n, "D": d}),
        barrier=needed,
        cheapest=None if cheapest is None else (cheapest["size"], cheapest["tokens"]),
    )


def pair_section(one: PairFit, *, figures: Figures) -> Section:
    record, picture = one.record, picture_of(one)
    first, second = one.names
    drawn = figures.add(
        partial(interaction_figure, picture),
        name="interaction",
        words="One model of both modalities against two models of one each, at the same size and "
        "tokens per modality: above zero they compete, below (shaded) each helps the other. Lines "
        "are the law, dots the runs.",
    )
    drawn += figures.add(
        partial(barrier_figure, picture),
        name="barrier",
        words="Where one model of both is better than two: right of and above the line. The star "
        "is where that costs the least compute.",
    )
    flops = 6 * picture.sizes * picture.tokens
    drawn += residual_html(figures, residuals_of(one.together, flops=flops))
    alone = {
        f"{name} alone": {**part, "intervals": {}}
        for name, part in zip(one.names, record["alone"], strict=True)
    }
    printed = {
        name: {"alpha": PRINTED_ALONE[name][0], "beta": PRINTED_ALONE[name][1]}
        for name in one.names
        if name in PRINTED_ALONE
    }
    html = (
        f"<h2>{escape(one.family)}: {escape(first)} and {escape(second)} in one model</h2>"
        f"{doubts(record)}{''.join(doubts({**record, **part}) for part in record['alone'])}"
        "<p>L = mean of the two laws alone - C + A/N<sup>&alpha;</sup> + B/D<sup>&beta;</sup>, "
        "where D are the tokens of both (arXiv 2301.03728). C is what each gains from the other in "
        f"the limit, A and B are the price of competition. {evidence(record)} A product form, "
        f"A/(N<sup>&alpha;</sup> D<sup>&beta;</sup>), reaches "
        f"{record['product_form']['objective']:.4e}.</p>{_barrier(record)}"
        f"{parameters_table({'together': record}, printed={})}"
        f"{parameters_table(alone, printed=printed)}"
        f"{metrics_table({'both': record, **alone})}{drawn}"
    )
    return Section(html, _rows(one))


def _barrier(record: Record) -> str:
    """The cheapest point of the barrier beside the one in print."""
    name, size, tokens = PRINTED_BARRIER
    printed = [f"in print: {name}", number(size), number(tokens), number(6 * size * tokens)]
    if record["barrier"] is None:
        reason = no_barrier(record)
        return f"<p>{reason[0].upper()}{reason[1:]}.</p>"
    cheapest, spread = record["barrier"], record["barrier_intervals"]
    cells = []
    for key in ("size", "tokens", "flops"):
        between = " to ".join(f"{end:.2e}" for end in spread.get(key, []))
        cells.append(number(cheapest[key]) + (f" ({between})" if between else ""))
    head = ["synergy begins, at the cheapest, at", "N", "D of both", "FLOPs"]
    return (
        table(head, [["this pair", *cells], printed], grey=[1])
        + "<p>Printed values of arXiv 2301.03728 are as others quote them; whether its D is of "
        "both modalities is not known.</p>"
    )


def _rows(one: PairFit) -> list[Row]:
    record = one.record
    name = f"{one.family}: {' and '.join(one.names)}"
    values = {**record["parameters"], **judged_values(record)}
    values["product form objective"] = record["product_form"]["objective"]
    rows = csv_rows(name, values, spread=record["intervals"])
    barrier = record["barrier"] or {}
    rows += csv_rows(f"{name}, barrier", barrier, spread=record["barrier_intervals"])
    for modality, part in zip(one.names, record["alone"], strict=True):
        values = {**part["parameters"], **judged_values(part)}
        rows += csv_rows(f"{one.family}: {modality} alone", values, spread={})
    return rows
