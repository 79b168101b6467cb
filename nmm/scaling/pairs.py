"""Two modalities alone and together, from a table or from runs, for `nmm/scaling/mixed.py`."""

import argparse
from dataclasses import dataclass

import numpy as np
import yaml

from nmm.errors import UserError
from nmm.rundir import CONFIG
from nmm.scaling.points import Points
from nmm.scaling.runs import Run, read_runs
from nmm.scaling.table import Rows, numbers, parse_columns, read_rows, refuse_doubtful, row_names

QUANTITIES = ("N", "D_i", "D_j", "L_i", "L_j")
LEAST = 5  # parameters of each of a pair's three laws


@dataclass(frozen=True)
class PairPoints:
    """What `fit_pair` takes, and the runs that are no points."""

    alone: tuple[Points, Points]
    together: Points
    modalities: tuple[str, str]
    left_out: dict[str, str]


@dataclass(frozen=True)
class _Source:
    """Rows, what their columns are called, how sentences name them."""

    rows: Rows
    columns: dict[str, str]
    names: tuple[str, ...]
    called: str

    def numbers(self, *quantities: str) -> dict[str, np.ndarray]:
        columns = {name: self.columns.get(name, name) for name in quantities}
        return numbers(self.rows, columns=columns, names=self.names, source=self.called)

    def select(self, chosen: np.ndarray) -> "_Source":
        places = np.flatnonzero(chosen).tolist()
        rows, names = [self.rows[p] for p in places], tuple(self.names[p] for p in places)
        return _Source(rows, self.columns, names, self.called)


def read(arguments: argparse.Namespace) -> PairPoints:
    """Rows without tokens of one modality are runs of the other alone."""
    source, left_out = _of_runs(arguments) if arguments.runs else (_of_table(arguments), {})
    names = _modalities(arguments) if arguments.pair else ("first", "second")
    tokens = source.numbers("N", "D_i", "D_j")
    has_i, has_j = tokens["D_i"] > 0, tokens["D_j"] > 0
    parts = []
    for what, chosen in (
        ("the first modality alone (D_j is 0)", has_i & ~has_j),
        ("the second modality alone (D_i is 0)", has_j & ~has_i),
        ("both", has_i & has_j),
    ):
        if chosen.sum() < LEAST:
            raise UserError(
                f"{source.called} has {chosen.sum()} rows of {what} and a law has {LEAST} "
                f"parameters; add runs."
            )
        parts.append(source.select(chosen))
    alone = _alone(parts[0], side="i"), _alone(parts[1], side="j")
    return PairPoints(alone, _together(parts[2]), names, left_out)


def _alone(source: _Source, *, side: str) -> Points:
    found = source.numbers("N", f"D_{side}", f"L_{side}")
    columns = {"N": found["N"], "D": found[f"D_{side}"]}
    points = Points(columns, found[f"L_{side}"], source.names)
    refuse_doubtful(points, source=source.called)
    return points


def _together(source: _Source) -> Points:
    found = source.numbers(*QUANTITIES)
    loss = (found.pop("L_i") + found.pop("L_j")) / 2
    points = Points(found, loss, source.names)
    refuse_doubtful(points, source=source.called)
    return points


def _of_table(arguments: argparse.Namespace) -> _Source:
    columns = {} if arguments.columns is None else parse_columns(arguments.columns)
    rows = read_rows(arguments.table)
    return _Source(rows, columns, row_names(rows), str(arguments.table))


def _of_runs(arguments: argparse.Namespace) -> tuple[_Source, dict[str, str]]:
    """Tokens and held-out losses by modality, or with --sources by source."""
    names = _modalities(arguments)
    runs = read_runs(arguments.runs)
    row = row_of_sources if arguments.sources else _row
    rows = [row(run, names) for run in runs.finished]
    names = tuple(str(run.directory) for run in runs.finished)
    return _Source(rows, {}, names, str(arguments.runs)), runs.left_out


def _modalities(arguments: argparse.Namespace) -> tuple[str, str]:
    """--pair; of a table it only names the two."""
    if arguments.pair is None or arguments.pair.count(",") != 1:
        raise UserError(f"--pair is {arguments.pair}; name two modalities of the runs: text,image.")
    first, second = arguments.pair.split(",")
    return first, second


def row_of_sources(run: Run, names: tuple[str, str]) -> dict[str, object]:
    """Where each of the two is a source of its own: losses of its documents, marks included.

    By modality, begin and end of units are text, which makes the text of a pair look easier.
    """
    row: dict[str, object] = {"N": run.size}
    for side, name in zip("ij", names, strict=True):
        row[f"D_{side}"] = run.end.get(f"tokens/source/{name}", 0)
        row[f"L_{side}"] = run.losses.get(f"loss/source/{name}")
    return row


def _row(run: Run, modalities: tuple[str, str]) -> dict[str, object]:
    row: dict[str, object] = {"N": run.size}
    for side, modality in zip("ij", modalities, strict=True):
        is_there = modality != "text" or _reads_text(run)
        row[f"D_{side}"] = run.end.get(f"tokens/modality/{modality}", 0) if is_there else 0
        row[f"L_{side}"] = run.losses.get(f"loss/modality/{modality}")
    return row


def _reads_text(run: Run) -> bool:
    """Is there a source of more than units? Their marks, begin and end, count as tokens of text."""
    said = yaml.load((run.directory / CONFIG).read_bytes(), Loader=yaml.CSafeLoader)
    sources = said.get("data", {}).get("sources", {}).values()
    read = [source["kind"] for source in sources if source["weight"] > 0]
    return not read or any(kind != "units" for kind in read)
