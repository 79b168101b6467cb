"""The commands on two modalities: `fit-mixed` and `phenomena`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nmm.errors import UserError
from nmm.scaling import pairs, phenomena
from nmm.scaling.files import FIT_MIXED, PAIR_POINTS, PHENOMENA, Record, csv_text, write, write_text
from nmm.scaling.fit import Solver
from nmm.scaling.lineage import whole_log
from nmm.scaling.pair_record import PairOptions, pair_record
from nmm.scaling.runs import read_runs
from nmm.scaling.say import say
from nmm.scaling.words import pair_table


def fit_mixed(arguments: argparse.Namespace) -> None:
    """Two modalities alone and together: DIR/fit_mixed.json and DIR/pair_points.csv."""
    found = pairs.read(arguments)
    options = PairOptions(
        delta=arguments.delta,
        solver=Solver(arguments.solver),
        resamples=arguments.bootstrap,
        seed=arguments.seed,
    )
    record, rows = pair_record(found.alone, found.together, options=options)
    say(pair_table(record))
    for name, reason in found.left_out.items():
        say(f"left out: {name}: {reason}")
    source = {"source": str(arguments.runs or arguments.table), "columns": arguments.columns}
    about = {"pair": found.modalities, **source, "left_out": found.left_out}
    write_text(arguments.out / PAIR_POINTS, csv_text(rows))
    write(arguments.out / FIT_MIXED, {**record, **about})


def phenomena_command(arguments: argparse.Namespace) -> None:
    """Pauses, spikes and best batches of every pair, and how they go with N, alpha and beta."""
    settings = phenomena.Settings(
        arguments.window, arguments.least_drop, arguments.spike_window, arguments.spread
    )
    fits = arguments.fits or [None] * len(arguments.runs)
    if not len(arguments.runs) == len(arguments.pair) == len(fits):
        raise UserError(
            f"--runs has {len(arguments.runs)} folders, --pair {len(arguments.pair)} pairs and "
            f"--fits {len(fits)} directories; give as many of each, in the same order."
        )
    found = [
        _of_pair(folder, pair=pair, fit=fit, settings=settings)
        for folder, pair, fit in zip(arguments.runs, arguments.pair, fits, strict=True)
    ]
    record: Record = {"settings": asdict(settings), "pairs": found}
    if arguments.fits:
        record["over_pairs"] = _over_pairs(found)
    for one in found:
        _print_phenomena(one)
    write(arguments.out / PHENOMENA, record)


def _of_pair(folder: Path, *, pair: str, fit: Path | None, settings: phenomena.Settings) -> Record:
    names = pair.split(",")
    if len(names) != 2:
        raise UserError(f"--pair is {pair}; name two modalities of the runs: text,image.")
    runs = read_runs(folder)
    measured = [
        (
            run,
            phenomena.dynamics(
                whole_log(run.directory, "losses.jsonl"),
                pair=(names[0], names[1]),
                settings=settings,
            ),
        )
        for run in runs.finished
    ]
    batches = phenomena.best_batches(runs.finished, loss="loss")
    return {
        "pair": pair,
        "folder": str(folder),
        **phenomena.summary(measured),
        "batches": [asdict(batch) for batch in batches],
        "interaction": None if fit is None else _read_interaction(fit),
        "left_out": runs.left_out,
    }


def _read_interaction(directory: Path) -> dict[str, float]:
    try:
        parameters: dict[str, float] = json.loads((directory / FIT_MIXED).read_text())["parameters"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--fits has {directory}, which has no readable {FIT_MIXED}; write one with "
            f"`python -m nmm.scaling fit-mixed ... --out {directory}`."
        ) from None
    return parameters


def _over_pairs(found: list[dict[str, Any]]) -> Record:
    """Rank correlations of the pairs' means with alpha, and of their best batches with beta."""
    alphas = np.array([one["interaction"]["alpha"] for one in found])
    record: Record = {}
    for name in ("paused", "alternations", "spike_rate"):
        with_alpha = phenomena.correlation(alphas, np.array([one["means"][name] for one in found]))
        record[f"{name}_with_alpha"] = with_alpha and asdict(with_alpha)
    best = [_mean_log_batch(one) for one in found]
    known = [place for place, value in enumerate(best) if value is not None]
    with_beta = phenomena.correlation(
        np.array([found[place]["interaction"]["beta"] for place in known]),
        np.array([best[place] for place in known]),
    )
    record["batch_with_beta"] = with_beta and asdict(with_beta)
    return record


def _mean_log_batch(one: dict[str, Any]) -> float | None:
    best = [b["best_tokens"] for b in one["batches"] if b["best_tokens"] is not None]
    return float(np.log(best).mean()) if best else None


def _print_phenomena(one: dict[str, Any]) -> None:
    say(f"== {one['pair']} in {one['folder']}: {len(one['runs'])} runs")
    for run in one["runs"]:
        first, second = run["paused_fraction"]
        say(
            f"  N {run['N']:>14,}   paused {first:.2f} and {second:.2f} of {run['windows']} "
            f"windows, {run['alternations']} alternations, {run['spikes']} spikes"
        )
    for name, found in one["with_N"].items():
        if found is not None:
            say(f"  {name} with N: rho {found['rho']:.2f} (p {found['p']:.3f})")
    for batch in one["batches"]:
        best = batch["best_tokens"]
        where = "outside of those tried" if best is None else f"{best:,.0f} tokens"
        say(f"  best batch of N {batch['size']:,}: {where}")
