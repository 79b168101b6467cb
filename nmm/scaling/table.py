"""Tables made by others: columns by name, every doubt about a number a sentence."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nmm.errors import UserError
from nmm.scaling.points import Points

LARGEST_GAP = 300.0  # between neighbouring values of one column; more, and units must be mixed
LARGEST_LOSS = 20.0  # nats per token; more is a perplexity
FLOPS_RATIO = 3.0  # between C and 6 N D of a row
COUNTS = ("N", "D", "U", "D_i", "D_j")  # which have a unit that could be mixed up

Rows = list[dict[str, Any]]


def parse_columns(text: str) -> dict[str, str]:
    """ "N=params,D=tokens,L=loss" -> {"N": "params", ..}."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    wrong = [
        name for name, equals, column in pairs if not (name.strip() and equals and column.strip())
    ]
    if wrong:
        raise UserError(f"--columns is {text!r}; write it like N=params,D=tokens,L=loss.")
    return {name.strip(): column.strip() for name, _, column in pairs}


def read_rows(path: Path) -> Rows:
    """The rows of a .csv, .tsv or .jsonl file; raises UserError for others and empty ones."""
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"--table is {path}; give a .csv, .tsv or .jsonl file.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in lines if line.strip()]
            else:
                rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
    except OSError as error:
        raise UserError(f"--table is {path}, which cannot be read ({error.strerror}).") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"--table is {path}, which is no {path.suffix} file ({error}).") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--table is {path}, which has no rows of named columns.")
    return rows


def read_points(
    rows: Rows, *, columns: Mapping[str, str], needed: Sequence[str], source: str
) -> Points:
    """The `needed` quantities and L, where `columns` says; D may be left out where C is given.

    Quantities of `columns` that are not needed are read too. Rows are counted from 1, as names.
    """
    if "D" in needed and "D" not in columns and "C" in columns:
        needed = [name for name in needed if name != "D"]
    wanted = {name: columns.get(name, name) for name in (*needed, *columns, "L")}
    names = row_names(rows)
    found = numbers(rows, columns=wanted, names=names, source=source)
    if "D" not in found and "C" in found:
        found["D"] = found["C"] / (6 * found["N"])
    loss = found.pop("L")
    points = Points(found, loss, names)
    refuse_doubtful(points, source=source)
    return points


def row_names(rows: Rows) -> tuple[str, ...]:
    """How sentences call the rows: counted from 1."""
    return tuple(f"row {place}" for place in range(1, len(rows) + 1))


def numbers(
    rows: Rows, *, columns: Mapping[str, str], names: Sequence[str], source: str
) -> dict[str, np.ndarray]:
    """float64[n] for each quantity of `columns` (quantity -> column); `names` are the rows'."""
    found = {
        name: _column(rows, column, as_name=name, names=names, source=source)
        for name, column in columns.items()
    }
    _refuse_values(found, names=names, source=source)
    return found


def labels(rows: Rows, *, column: str, source: str) -> list[str]:
    """A column of words, such as the one to group by."""
    if column not in rows[0]:
        raise UserError(_no_column(rows, column, option="--group", source=source))
    return [str(row[column]) for row in rows]


def _column(
    rows: Rows, column: str, *, as_name: str, names: Sequence[str], source: str
) -> np.ndarray:
    if column not in rows[0]:
        raise UserError(_no_column(rows, column, option=f"--columns for {as_name}", source=source))
    values = np.empty(len(rows))
    for place, row in enumerate(rows):
        try:
            values[place] = float(row[column])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{names[place]} of {source} has {as_name} = {row.get(column)!r}, which is no "
                f"number; correct or remove the row."
            ) from None
    return values


def _no_column(rows: Rows, column: str, *, option: str, source: str) -> str:
    found = ", ".join(str(name) for name in rows[0])
    return f"{source} has no column {column!r} ({option}); it has: {found}."


def _refuse_values(found: Mapping[str, np.ndarray], *, names: Sequence[str], source: str) -> None:
    """Not-a-number, infinity, and anything that has no logarithm; shares and vision may be 0."""
    for name, values in found.items():
        may_be_zero = name.startswith(("share/", "D_i", "D_j", "N_v", "D_v", "S"))
        bad = ~np.isfinite(values) | (values < 0) | ((values == 0) & (not may_be_zero))
        if bad.any():
            place = int(np.argmax(bad))
            wish = "a number of 0 or more" if may_be_zero else "a number above 0"
            raise UserError(
                f"{names[place]} of {source} has {name} = {values[place]:g} and needs {wish}; "
                f"correct or remove the row."
            )
        if name == "S" and (values >= 1).any():
            raise UserError(f"{source} has S = {values.max():g}; it is a fraction below 1.")


def refuse_doubtful(points: Points, *, source: str) -> None:
    """Mixed units, perplexities for losses, C that is not 6 N D, points that are there twice."""
    for name in (name for name in COUNTS if name in points.columns):
        _refuse_mixed_units(points, name=name, source=source)
    highest = int(points.loss.argmax())
    if points.loss[highest] > LARGEST_LOSS:
        raise UserError(
            f"{points.names[highest]} of {source} has L = {points.loss[highest]:g}; losses are "
            f"nats per token, so give the logarithm of a perplexity, or drop the row."
        )
    columns = points.columns
    if {"C", "N", "D"} <= columns.keys():
        ratio = columns["C"] / (6 * columns["N"] * columns["D"])
        worst = int(np.abs(np.log(ratio)).argmax())
        if not 1 / FLOPS_RATIO < ratio[worst] < FLOPS_RATIO:
            raise UserError(
                f"{points.names[worst]} of {source} has C = {columns['C'][worst]:.4g} and 6 N D = "
                f"{columns['C'][worst] / ratio[worst]:.4g}; give all in single parameters, tokens "
                f"and FLOPs."
            )
    _refuse_twins(points, source=source)


def _refuse_mixed_units(points: Points, *, name: str, source: str) -> None:
    values = points.columns[name]
    order = np.argsort(values)
    order = order[values[order] > 0]
    gaps = values[order[1:]] / values[order[:-1]]
    if len(gaps) and gaps.max() > LARGEST_GAP:
        low, high = order[int(gaps.argmax())], order[int(gaps.argmax()) + 1]
        raise UserError(
            f"{name} of {source} is {values[low]:g} in {points.names[low]} and {values[high]:g} in "
            f"{points.names[high]}, with nothing between; give all rows in the same unit."
        )


def _refuse_twins(points: Points, *, source: str) -> None:
    seen: dict[tuple[float, ...], str] = {}
    for place, values in enumerate(zip(*points.columns.values(), points.loss, strict=True)):
        twin = seen.setdefault(tuple(float(value) for value in values), points.names[place])
        if twin != points.names[place]:
            raise UserError(
                f"{twin} and {points.names[place]} of {source} are the same point, with the same "
                f"loss; remove one of them."
            )
