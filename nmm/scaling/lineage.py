"""Where a run comes from: its parents, and their parents, as far as their folders are there."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nmm.log import Row, read_rows


def ancestors(
    directory: Path, manifest: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Path]]:
    """What a run's manifest says of its parent and the parent's folder, then of its parent's."""
    seen = {directory.resolve()}
    while parent := manifest.get("parent"):
        directory = folder_of(parent, directory)
        yield parent, directory
        manifest = _manifest(directory)
        if directory.resolve() in seen:
            return
        seen.add(directory.resolve())


def folder_of(parent: Mapping[str, Any], directory: Path) -> Path:
    """As the run noted it, or beside the run where all runs were moved together."""
    noted = Path(parent["run"])
    return noted if noted.exists() else directory.resolve().parent / noted.name


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}


def whole_log(directory: Path, name: str) -> list[Row]:
    """The rows of a log (`losses.jsonl`); of a branch after those of its trunk, if it is there."""
    rows = read_rows(directory / name)
    for parent, folder in ancestors(directory, _manifest(directory)):
        if parent.get("mode") != "branch":
            break
        last = min(parent["step"], rows[0]["step"] - 1 if rows else parent["step"])
        rows = [row for row in read_rows(folder / name) if row["step"] <= last] + rows
    return rows
