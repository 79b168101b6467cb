"""What commands leave behind and others read: fit.json and resamples.json."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nmm.errors import UserError
from nmm.scaling.say import say

FIT, RESAMPLES, POINTS = "fit.json", "resamples.json", "points.csv"
FIT_MIXED, PAIR_POINTS, PHENOMENA = "fit_mixed.json", "pair_points.csv", "phenomena.json"

Record = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """One fit of a directory: its record, its resampled parameters if any, and its points.

    Columns of `points` are those of points.csv, float64[n] but `point`, which names them.
    """

    title: str
    record: Record
    resamples: Mapping[str, np.ndarray] = field(default_factory=dict)
    points: Mapping[str, np.ndarray] = field(default_factory=dict)


def write(path: Path, record: Mapping[str, Any]) -> None:
    """As JSON, like `write_text`."""
    indent = None if path.name == RESAMPLES else 1
    write_text(path, json.dumps(finite(record), indent=indent, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same with null for what JSON has no number for: a resample may know no coefficient."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Whole or not at all; raises UserError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(text)
        beside.replace(path)
    except OSError as error:
        raise UserError(
            f"--out is {path.parent}, which cannot be written ({error.strerror})."
        ) from None
    say(f"wrote {path}")


def write_fits(directory: Path, record: Record) -> None:
    """fit.json, and beside it the points and the resampled parameters of all its fits."""
    rows = [
        {"fit": title, **row} for title, one in titled(record).items() for row in one.pop("rows")
    ]
    resamples = {
        title: one["bootstrap"].pop("parameters")
        for title, one in titled(record).items()
        if "bootstrap" in one
    }
    if resamples:
        write(directory / RESAMPLES, resamples)
    write_text(directory / POINTS, csv_text(rows))
    write(directory / FIT, record)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A header of all keys, and the rows; numbers in full precision, nothing for no number."""
    out = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and v != v else v for k, v in row.items()})
    return out.getvalue()


def read_fits(directory: Path) -> list[Written]:
    """All fits of a directory; raises UserError where there are none."""
    try:
        record = json.loads((directory / FIT).read_text())
        path = directory / RESAMPLES
        resamples = json.loads(path.read_text()) if path.exists() else {}
        with (directory / POINTS).open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        fits = titled(record)
    except (OSError, ValueError, KeyError, AttributeError):
        raise UserError(
            f"{directory} has no readable {FIT}; write one with "
            f"`python -m nmm.scaling fit ... --out {directory}`."
        ) from None
    return [
        Written(
            title,
            one,
            {
                name: np.array(values, dtype=float)
                for name, values in resamples.get(title, {}).items()
            },
            _columns([row for row in rows if row["fit"] == title]),
        )
        for title, one in fits.items()
    ]


def _columns(rows: list[dict[str, str]]) -> dict[str, np.ndarray]:
    keys = [key for key in (rows[0] if rows else {}) if key not in ("fit", "point")]
    found = {key: np.array([float(row[key] or "nan") for row in rows]) for key in keys}
    return {"point": np.array([row["point"] for row in rows]), **found}


def read_fit(directory: Path, *, title: str) -> Written:
    """The fit of that title; raises UserError where there is none."""
    fits = {one.title: one for one in read_fits(directory)}
    if title not in fits:
        raise UserError(f"--of is {title!r}, which {directory} does not have: {', '.join(fits)}.")
    return fits[title]


def titled(record: Record) -> dict[str, Record]:
    """Every fit of a fit.json by its title."""
    found = {}
    for loss, one in {"loss": record, **record.get("losses", {})}.items():
        if "groups" in one:
            for group, fitted in one["groups"].items():
                found[title_of(one["group"], group=group, loss=loss)] = fitted
        else:
            found[loss] = one
    return found


def title_of(key: str | None, *, group: str, loss: str) -> str:
    """ "model.width 32, loss/kind/text": what a fit is of."""
    return f"{key} {group}, {loss}" if key else loss
