"""From the flags of a command to points: a table or run directories, grouped or not."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmm.errors import UserError
from nmm.scaling.fit import AnyLaw
from nmm.scaling.laws import CHINCHILLA, SPARSE
from nmm.scaling.mixtures import SHARE, MixtureLaw
from nmm.scaling.points import Points
from nmm.scaling.repeated import RepeatedLaw
from nmm.scaling.runs import labels_of, points_of, read_runs, shares_of
from nmm.scaling.table import Rows, labels, parse_columns, read_points, read_rows

LOSS = "L/"  # prefix of --columns for one of several losses
LAWS = ("chinchilla", "sparse", "repeated", "mixture", "mixture-joint")


@dataclass(frozen=True)
class Input:
    """Points by loss and by group ("" without --group), and the runs that are no points."""

    losses: dict[str, dict[str, Points]]
    left_out: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--table and --columns, or --runs; --group for both."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", type=Path, help="a .csv, .tsv or .jsonl file with a row per run")
    source.add_argument("--runs", type=Path, metavar="DIR", help="a folder of run directories")
    parser.add_argument(
        "--columns",
        metavar="N=..,D=..,L=..",
        help="which column of the table is what; C=.. may stand for D, then D = C / 6N; several "
        "losses are L/text=..,L/caption=..",
    )
    parser.add_argument(
        "--group", metavar="NAME", help="a column, or a key of config.yaml: one fit for each value"
    )


def read(arguments: argparse.Namespace, *, needed: Sequence[str], loss: str | None = None) -> Input:
    """The points with the `needed` quantities.

    A table has the loss or losses that --columns names. Of runs it is `loss`; None stands for the
    mean of the kinds, then every kind, and every modality where several have a loss.
    """
    if arguments.runs is not None:
        if arguments.columns is not None:
            raise UserError("--columns belongs to --table; runs have their columns by themselves.")
        return _from_runs(arguments, needed=needed, loss=loss)
    if loss is not None:
        raise UserError("--loss is a key of runs; a table's is named in --columns as L=COLUMN.")
    columns = {} if arguments.columns is None else parse_columns(arguments.columns)
    rows, source = read_rows(arguments.table), str(arguments.table)
    words = None
    if arguments.group is not None:
        words = labels(rows, column=arguments.group, source=source)
    losses = {
        key: _grouped(_with_keep(points), words)
        for key, points in _losses_of(rows, columns, needed=needed, source=source).items()
    }
    return Input(losses, {})


def _losses_of(
    rows: Rows, columns: dict[str, str], *, needed: Sequence[str], source: str
) -> dict[str, Points]:
    """The one loss L; of several L/NAME their mean, as of runs, and then every one."""
    targets = {name[len(LOSS) :]: c for name, c in columns.items() if name.startswith(LOSS)}
    others = {name: c for name, c in columns.items() if not name.startswith(LOSS)}
    if not targets:
        return {"loss": read_points(rows, columns=columns, needed=needed, source=source)}
    if "L" in others:
        raise UserError("--columns has L and L/NAME; give either one loss or several with names.")
    found = {
        f"loss/kind/{name}": read_points(
            rows, columns={**others, "L": column}, needed=needed, source=source
        )
        for name, column in targets.items()
    }
    first = next(iter(found.values()))
    mean = np.mean([points.loss for points in found.values()], axis=0)
    return {"loss": Points(first.columns, mean, first.names), **found}


def _from_runs(arguments: argparse.Namespace, *, needed: Sequence[str], loss: str | None) -> Input:
    runs = read_runs(arguments.runs)
    kinds = [key for key in runs.finished[0].losses if key.startswith("loss/kind/")]
    modalities = [key for key in runs.finished[0].losses if key.startswith("loss/modality/")]
    kinds += modalities if len(modalities) > 1 else []
    words = None if arguments.group is None else labels_of(runs.finished, key=arguments.group)
    losses = {}
    for key in ["loss", *kinds] if loss is None else [loss]:
        points = points_of(runs.finished, loss=key)
        columns = {**points.columns, **shares_of(runs.finished)}
        points = _with_keep(Points(columns, points.loss, points.names))
        if missing := [name for name in needed if name not in points.columns]:
            raise UserError(
                f"--runs is {arguments.runs}, whose runs do not tell {', '.join(missing)}; give a "
                f"table that does."
            )
        losses[key] = _grouped(points, words)
    return Input(losses, runs.left_out)


def _with_keep(points: Points) -> Points:
    if "S" not in points.columns:
        return points
    keep = 1 - points.columns["S"]
    return Points({**points.columns, "keep": keep}, points.loss, points.names)


def _grouped(points: Points, words: Sequence[str] | None) -> dict[str, Points]:
    if words is None:
        return {"": points}
    return {
        word: points.select(np.array([other == word for other in words]))
        for word in sorted(set(words))
    }


def needs(law: str) -> tuple[str, ...]:
    """What a table must tell for a law, beside L."""
    return {"sparse": ("N", "D", "S"), "repeated": ("N", "D", "U")}.get(law, ("N", "D"))


def law_of(name: str, *, points: Points) -> AnyLaw:
    """The law of LAWS; the domains of a mixture are those that the points have shares of."""
    match name:
        case "chinchilla":
            return CHINCHILLA
        case "sparse":
            return SPARSE
        case "repeated":
            return RepeatedLaw()
    return mixture_of(points, joint=name == "mixture-joint")


def mixture_of(points: Points, *, joint: bool) -> MixtureLaw:
    """The mixture law of the share/NAME columns; raises UserError for shares that are no shares."""
    domains = tuple(name[len(SHARE) :] for name in points.columns if name.startswith(SHARE))
    if len(domains) < 2:
        raise UserError(
            "the mixture law needs the shares of two domains or more; name them in --columns like "
            "share/text=COLUMN,share/image=COLUMN."
        )
    total = np.sum([points.columns[SHARE + domain] for domain in domains], axis=0)
    worst = int(np.abs(total - 1).argmax())
    if abs(total[worst] - 1) > 0.01:
        raise UserError(
            f"the shares of {points.names[worst]} add up to {total[worst]:.4g}; they are fractions "
            f"of the tokens and add up to 1."
        )
    return MixtureLaw(domains, joint=joint)
