"""Sections of the report on training dynamics: pauses, alternation, gradient spikes, batches."""

import json
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nmm.errors import UserError
from nmm.plot.mixed import batch_figure, dynamics_figure
from nmm.scaling.files import PHENOMENA, Record
from nmm.scaling.pieces import Figures, Row, Section, csv_rows, number, table

MEASURES = {
    "paused": "paused windows, both modalities",
    "alternations": "alternations per window",
    "spike_rate": "spikes per logged step",
}


@dataclass(frozen=True)
class Observed:
    """What `phenomena` wrote."""

    family: str
    record: Record


def read_phenomena(family: str, directory: Path) -> Observed:
    try:
        record = json.loads((directory / PHENOMENA).read_text())
        _ = [(one["runs"], one["with_N"], one["batches"]) for one in record["pairs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory} has no readable {PHENOMENA}; write one with "
            f"`python -m nmm.scaling phenomena ... --out {directory}`."
        ) from None
    return Observed(family, record)


def phenomena_section(one: Observed, *, figures: Figures) -> Section:
    settings = one.record["settings"]
    parts = [
        f"<h2>{escape(one.family)}: how training on two modalities goes</h2>"
        "<p>A modality pauses in a window of the log when its loss falls by less than "
        f"{settings['least_drop']:g} nats over {settings['window_rows']} logged steps while the "
        "other's falls by more; it alternates when the pause passes to the other. A spike is a "
        f"gradient norm above the median by {settings['spread']:g} median deviations of the "
        f"{settings['spike_rows']} logged steps before.</p>"
    ]
    rows: list[Row] = []
    for pair in one.record["pairs"]:
        parts.append(_pair(pair, figures=figures))
        rows += _rows(one.family, pair)
    if over := one.record.get("over_pairs"):
        parts.append("<h3>Over pairs</h3>" + _correlations(over))
        rows += csv_rows(f"{one.family}, over pairs", _rho(over), spread={})
    return Section("".join(parts), rows)


def _pair(pair: dict[str, Any], *, figures: Figures) -> str:
    runs, names = pair["runs"], pair["pair"].split(",")
    sizes = np.array([float(run["N"]) for run in runs])
    fractions = np.array([run["paused_fraction"] for run in runs])
    drawn = figures.add(
        partial(
            dynamics_figure,
            sizes,
            paused=dict(zip(names, fractions.T, strict=True)),
            alternations=np.array([run["alternations"] / run["windows"] for run in runs]),
            spike_rate=np.array([run["spike_rate"] for run in runs]),
        ),
        name="dynamics",
        words="A mark is a run. arXiv 2301.03728 reports that larger models pause and spike less.",
        wide=True,
    )
    head = ["run", "N", f"{names[0]} pauses", f"{names[1]} pauses", "windows", "alternations"]
    lines = [
        [
            Path(run["run"]).name,
            f"{run['N']:,}",
            *(f"{fraction:.2f}" for fraction in run["paused_fraction"]),
            *(f"{run[key]:,}" for key in ("windows", "alternations", "spikes")),
        ]
        for run in runs
    ]
    left_out = "".join(
        f"<li>{escape(f'No point: {name} ({reason}).')}</li>"
        for name, reason in pair["left_out"].items()
    )
    return (
        f"<h3>{escape(' and '.join(names))}</h3>"
        f"{f'<ul class=doubt>{left_out}</ul>' if left_out else ''}"
        f"{drawn}{_correlations({f'{MEASURES[k]}, with N': v for k, v in pair['with_N'].items()})}"
        f"{table([*head, 'spikes'], lines)}{_batches(pair, figures=figures)}"
    )


def _correlations(found: Record) -> str:
    rows = [
        [name.replace("_", " "), f"{one['rho']:.2f}", f"{one['p']:.3f}", str(one["points"])]
        if one
        else [name.replace("_", " "), "too few or all alike", "", ""]
        for name, one in found.items()
    ]
    return table(["rank correlation of", "rho", "p", "points"], rows)


def _batches(pair: dict[str, Any], *, figures: Figures) -> str:
    """The scans of batch sizes, where runs differ in nothing else."""
    if not pair["batches"]:
        return ""
    scans = [
        (
            f"N = {scan['size']:.3g}, D = {scan['tokens']:.3g}",
            np.array(scan["batches_tokens"]),
            np.array(scan["losses"]),
            scan["best_tokens"],
        )
        for scan in pair["batches"]
    ]
    rows = [
        [
            f"{scan['size']:,}",
            f"{scan['tokens']:,}",
            "outside of those tried"
            if scan["best_tokens"] is None
            else number(scan["best_tokens"]),
        ]
        for scan in pair["batches"]
    ]
    return figures.add(
        partial(batch_figure, scans),
        name="batches",
        words="Runs that differ in the tokens per step only; stars are the best of each scan.",
    ) + table(["N", "D", "best tokens per step"], rows)


def _rows(family: str, pair: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for run in pair["runs"]:
        first, second = run["paused_fraction"]
        values = {"paused fraction of the first": first, "paused fraction of the second": second}
        values |= {key: run[key] for key in ("N", "windows", "alternations", "spikes")}
        rows += csv_rows(f"{family}: {run['run']}", values, spread={})
    rows += csv_rows(f"{family}: {pair['pair']}", _rho(pair["with_N"]), spread={})
    for scan in pair["batches"]:
        values = {f"best tokens per step at N = {scan['size']}": scan["best_tokens"]}
        rows += csv_rows(f"{family}: {pair['pair']}", values, spread={})
    return rows


def _rho(found: Record) -> dict[str, float]:
    return {f"rho of {name}": one["rho"] for name, one in found.items() if one}
