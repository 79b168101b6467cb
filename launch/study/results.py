"""From the finished runs of a study to its table, its laws, its answers and its report."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.study.answers import Found, answer
from launch.study.measured import fits_of, measure_across, measure_experts, module, pair_of
from launch.study.run import StudyRun
from launch.study.state import Folder, Standing, State
from nmm.config import Measure, StudyConfig
from nmm.scaling.answers import write_answers
from nmm.scaling.files import csv_text
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.runs import Run, read_run

TABLE, ANSWERS = "runs.csv", "answers"
OF_EXPERTS = (Measure.specialisation_first, Measure.specialisation_last)


def write_results(
    study: StudyConfig,
    runs: Sequence[StudyRun],
    standings: Mapping[str, Standing],
    *,
    folder: Folder,
) -> None:
    """runs.csv, points/GROUP/, fits/GROUP/, answers/ and report/, from what is finished."""
    folder.write(TABLE, csv_text([_row(run, standings[run.name], folder) for run in runs]))
    print(f"wrote {folder.notes / TABLE}", flush=True)
    fits = [
        *_laws(_groups(runs, standings), study, folder=folder),
        *_pairs(study, _groups(runs, standings), folder=folder),
    ]
    points = [run for run in runs if run.is_point and standings[run.name].state is State.finished]
    if study.questions and points:
        fits.insert(0, _answers(Found(study, points, folder)))
    if fits:
        command("report", "--fit", *fits, "--out", str(folder.notes / "report"))


def _laws(groups: Mapping[str, list[StudyRun]], study: StudyConfig, *, folder: Folder) -> list[str]:
    """NAME=DIR of every fit. A group needs more models than its law has parameters."""
    needed, fits = len(CHINCHILLA.names) + 1, []
    for name, points in groups.items():
        forget(fits_of(folder) / name)
        if len(points) < needed:
            print(f"no law for {name}: {len(points)} models, and at least {needed} are needed")
        elif len({run.tokens for run in points}) == 1:
            print(f"no law for {name}: all {len(points)} models have as many tokens")
        else:
            link_points(points, folder.notes / "points" / name, runs=folder.runs)
            fits += _fit(name, study, folder=folder)
    return fits


def _pairs(
    study: StudyConfig, groups: Mapping[str, list[StudyRun]], *, folder: Folder
) -> list[str]:
    """NAME=DIR of the law of every pair, of families that were trained on it and on both alone."""
    fits = []
    for family in study.families:
        for pair, alone in study.pairs.items():
            there = [groups.get(f"{family}-{mixture}", []) for mixture in (*alone, pair)]
            joint = [run for runs in groups.values() for run in runs if run.cell.mixture == pair]
            forget(pair_of(folder, family=family, pair=pair))
            if all(there):
                fits += _fit_pair(study, family, pair, there, scanned=joint, folder=folder)
    return fits


def _fit_pair(
    study: StudyConfig,
    family: str,
    pair: str,
    there: list[list[StudyRun]],
    *,
    scanned: list[StudyRun],
    folder: Folder,
) -> list[str]:
    """Its law, and beside it how training on both goes, of runs with other batches as well."""
    points = folder.notes / "points"
    out, name = pair_of(folder, family=family, pair=pair), f"{family}-pair-{pair}"
    link_points([run for runs in there for run in runs], points / name, runs=folder.runs)
    link_points(scanned, points / f"{name}-joint", runs=folder.runs)
    both = ("--pair", ",".join(study.pairs[pair]), "--out", str(out))
    resampled = ("--sources", "--bootstrap", str(study.bootstrap))
    done = command("fit-mixed", "--runs", str(points / name), *both, *resampled)
    joint = ("--runs", str(points / f"{name}-joint"), "--window", str(study.window_rows))
    done |= command("phenomena", *joint, "--spike-window", str(study.window_rows), *both)
    return [f"{name}={out}"] if done else []


def _answers(found: Found) -> str:
    """NAME=DIR of the answers to the study's questions."""
    asked = found.study.questions.values()
    for question in asked:
        longest = found.longest(question.of, mixture=question.mixture)
        if question.measure in OF_EXPERTS:
            for run in longest:
                measure_experts(found.folder.run(run.name))
        if question.measure is Measure.perplexity_ratio:
            _measure_pair(found, question.of, pair=str(question.pair))
    answers = [answer(name, one, found=found) for name, one in found.study.questions.items()]
    out = found.folder.notes / ANSWERS
    write_answers(answers, study=found.study.name, out=out)
    return f"{found.study.name}={out}"


def _measure_pair(found: Found, family: str, *, pair: str) -> None:
    """Of each of the two alone, the losses on the other's documents."""
    first, second = (found.longest(family, mixture=one) for one in found.study.pairs[pair])
    for own, others in ((first, second), (second, first)):
        for run in own:
            measure_across(found.folder, run.name, others=[one.name for one in others[:1]])


def _groups(
    runs: Sequence[StudyRun], standings: Mapping[str, Standing]
) -> dict[str, list[StudyRun]]:
    """The finished models of every family and mixture."""
    found: dict[str, list[StudyRun]] = {}
    for run in runs:
        if run.is_point:
            points = found.setdefault(run.cell.group, [])
            if standings[run.name].state is State.finished:
                points.append(run)
    return found


def link_points(points: Sequence[StudyRun], directory: Path, *, runs: Path) -> None:
    """A folder of links to exactly these runs, for `python -m nmm.scaling fit --runs`."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.iterdir():
        stale.unlink()
    for run in points:
        target = os.path.relpath(runs / run.name, directory)
        (directory / run.name).symlink_to(target, target_is_directory=True)


def _fit(name: str, study: StudyConfig, *, folder: Folder) -> list[str]:
    """NAME=DIR of the fit; nothing where it was refused, which is said."""
    out = fits_of(folder) / name
    done = command(
        *("fit", "--runs", str(folder.notes / "points" / name)),
        *("--bootstrap", str(study.bootstrap), "--out", str(out)),
    )
    return [f"{name}={out}"] if done else []


def forget(directory: Path) -> None:
    """Remove what an earlier fit wrote: if this one is refused, nothing must answer for it."""
    if directory.exists():
        shutil.rmtree(directory)


def command(*words: str) -> bool:
    """Run a command of nmm.scaling; False when it was refused."""
    return module("nmm.scaling", *words).returncode == 0


def _row(run: StudyRun, standing: Standing, folder: Folder) -> dict[str, object]:
    """What is known of a run; tokens, FLOPs and losses as measured."""
    cell = run.cell
    row: dict[str, object] = {
        "run": run.name,
        "role": run.role.value,
        "state": standing.state.value,
        "note": standing.note,
        "family": cell.family,
        "size": cell.size,
        "mixture": cell.mixture,
        "seed": cell.seed,
        "trunk": run.trunk or "",
        "first_step": run.first_step,
        "steps": run.phases.total_steps,
        "N": cell.parameters.N,
        "N_active": cell.parameters.N_active,
        "N_vision": cell.parameters.N_vision,
    }
    if not run.is_point or standing.state is not State.finished:
        return row
    found = read_run(folder.run(run.name))
    assert isinstance(found, Run), found
    measured = {"tokens": found.tokens, "flops": found.flops, **found.losses}
    return {**row, **measured, "commit": found.manifest["starts"][-1]["git_commit"]}
