"""What commands leave behind and others read: fit.json and resamples.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmm.errors import UserError

FIT, RESAMPLES = "fit.json", "resamples.json"

Record = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """One fit of a directory: its record, and its resampled parameters where there are some."""

    title: str
    record: Record
    resamples: Mapping[str, np.ndarray]


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all; raises UserError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        indent = None if path.name == RESAMPLES else 1
        beside.write_text(json.dumps(record, indent=indent, allow_nan=False) + "\n")
        beside.replace(path)
    except OSError as error:
        raise UserError(
            f"--out is {path.parent}, which cannot be written ({error.strerror})."
        ) from None
    print(f"wrote {path}")


def write_fits(directory: Path, record: Record) -> None:
    """fit.json, and the resampled parameters of all its fits beside it."""
    resamples = {
        title: one["bootstrap"].pop("parameters")
        for title, one in titled(record).items()
        if "bootstrap" in one
    }
    if resamples:
        write(directory / RESAMPLES, resamples)
    write(directory / FIT, record)


def read_fits(directory: Path) -> list[Written]:
    """All fits of a directory; raises UserError where there are none."""
    try:
        record = json.loads((directory / FIT).read_text())
        path = directory / RESAMPLES
        resamples = json.loads(path.read_text()) if path.exists() else {}
        fits = titled(record)
    except (OSError, ValueError, KeyError, AttributeError):
        raise UserError(
            f"{directory} has no readable {FIT}; write one with "
            f"`python -m nmm.scaling fit ... --out {directory}`."
        ) from None
    return [
        Written(title, one, {n: np.array(v) for n, v in resamples.get(title, {}).items()})
        for title, one in fits.items()
    ]


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
