"""A study's questions, answered from its finished runs and its fits (nmm/scaling/answers.py)."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from launch.study.measured import across_of, experts_of, fits_of, pair_of
from launch.study.run import Cell, StudyRun
from launch.study.state import Folder
from launch.study.words import measured
from nmm.config import Measure, QuestionConfig, StudyConfig
from nmm.errors import UserError
from nmm.scaling import estimates, phenomena
from nmm.scaling.answers import Answer
from nmm.scaling.estimates import Estimate
from nmm.scaling.eta import eta
from nmm.scaling.files import FIT_MIXED, PAIR_POINTS, Record, Written, read_fit
from nmm.scaling.runs import Run, read_run
from nmm.scaling.words import no_barrier

Groups = dict[str, list[float]]
FEWEST_EVALUATIONS = 4  # of both runs of an eta by held-out losses


class NoAnswerError(Exception):
    """Why a question has no number."""


@dataclass(frozen=True)
class Found:
    """The finished models of a study, and where it keeps its results."""

    study: StudyConfig
    points: Sequence[StudyRun]
    folder: Folder

    def of(self, family: str, *, mixture: str | None) -> list[StudyRun]:
        """Those of a family; None: of every mixture."""
        return [
            run
            for run in self.points
            if run.cell.family == family and mixture in (None, run.cell.mixture)
        ]

    def longest(self, family: str, *, mixture: str | None) -> list[StudyRun]:
        """Of every size, mixture and seed the run with the most tokens."""
        most: dict[str, StudyRun] = {}
        for run in sorted(self.of(family, mixture=mixture), key=lambda run: run.tokens):
            most[run.cell.name] = run
        return list(most.values())

    def read(self, run: StudyRun) -> Run:
        found = read_run(self.folder.run(run.name))
        assert isinstance(found, Run), found
        return found

    def fit(self, question: QuestionConfig, *, family: str) -> Written:
        """The law of a family; raises NoAnswerError."""
        mixtures = [question.mixture] if question.mixture else list(self.study.mixtures)
        if len(mixtures) > 1:
            raise NoAnswerError("the study has several mixtures, and the question names none")
        group = "-".join([family, *mixtures])
        try:
            return read_fit(fits_of(self.folder) / group, title=question.loss)
        except UserError:
            raise NoAnswerError(f"there is no law of {question.loss} for {group}") from None

    def pair(self, question: QuestionConfig) -> Path:
        """Where `fit-mixed` wrote; raises NoAnswerError."""
        directory = pair_of(self.folder, family=question.of, pair=str(question.pair))
        if not (directory / FIT_MIXED).exists():
            raise NoAnswerError(f"there is no law of the pair {question.pair} for {question.of}")
        return directory


def answer(name: str, question: QuestionConfig, *, found: Found) -> Answer:
    """With the reason where there is no number."""
    about = (name.replace("_", " "), measured(question))
    claim, paper = question.range, question.paper
    try:
        estimate = estimate_of(question, found)
    except NoAnswerError as reason:
        return Answer(*about, None, claim, paper, why_not=str(reason))
    if estimate is None:
        return Answer(*about, None, claim, paper, why_not="no finished runs to compare")
    return Answer(*about, estimate, claim, paper)


def estimate_of(question: QuestionConfig, found: Found) -> Estimate | None:
    """None where runs are missing; raises NoAnswerError."""
    asked = question.measure
    match asked:
        case Measure.loss_gap:
            return estimates.mean_of(loss_gaps(question, found))
        case Measure.frontier_gap_low | Measure.frontier_gap_high:
            fits = [found.fit(question, family=one) for one in (question.of, str(question.against))]
            at_most = asked is Measure.frontier_gap_high
            gap = estimates.frontier_gap(*fits, at_most=at_most)
            if gap is None:
                raise NoAnswerError("the two families have no FLOPs in common")
            return gap
        case Measure.size_exponent | Measure.tokens_exponent:
            which = "a" if asked is Measure.size_exponent else "b"
            return estimates.exponent(found.fit(question, family=question.of), name=which)
        case Measure.prediction_error:
            missed = estimates.prediction_error(found.fit(question, family=question.of))
            if missed is None:
                raise NoAnswerError("without the largest size fewer than three sizes are left")
            return missed
        case Measure.specialisation_first | Measure.specialisation_last:
            place = 0 if asked is Measure.specialisation_first else 1
            return estimates.mean_of(layer_contrasts(question, found, place=place))
        case Measure.synergy:
            return estimates.of_interaction(_record(found.pair(question)), name="C")
        case Measure.synergy_flops:
            return barrier(_record(found.pair(question)))
        case Measure.interaction:
            pair = found.pair(question)
            return estimates.interaction(_record(pair), gains(pair))
        case Measure.perplexity_ratio:
            return estimates.ratio_of(perplexity_ratios(question, found))
        case Measure.best_batch:
            return best_batch(question, found)
        case Measure.eta:
            return estimates.ratio_of(etas(question, found))


def _record(directory: Path) -> Record:
    record: Record = json.loads((directory / FIT_MIXED).read_text())
    return record


def barrier(record: Record) -> Estimate:
    found = estimates.barrier_flops(record)
    if found is None:
        share = record.get("synergy_fraction")
        some = "" if share is None else f"; {share:.0%} of the resamples have C above 0"
        raise NoAnswerError(f"{no_barrier(record)}{some}")
    return found


def _twins(question: QuestionConfig, found: Found) -> list[tuple[StudyRun, StudyRun]]:
    """Runs of the two families that differ in nothing else."""

    def place(run: StudyRun) -> tuple[str, str, int, str]:
        cell: Cell = run.cell
        return cell.size, cell.mixture, cell.seed, run.name.rpartition("-")[2]

    others = {place(run): run for run in found.of(str(question.against), mixture=question.mixture)}
    own = found.of(question.of, mixture=question.mixture)
    return [(run, others[place(run)]) for run in own if place(run) in others]


def loss_gaps(question: QuestionConfig, found: Found) -> Groups:
    """By size."""
    groups: Groups = {}
    for run, other in _twins(question, found):
        losses = [_loss(found.read(one), question.loss) for one in (other, run)]
        groups.setdefault(run.cell.size, []).append(losses[0] - losses[1])
    return groups


def _loss(run: Run, key: str) -> float:
    if key not in run.losses:
        raise NoAnswerError(f"{run.directory.name} has no {key}")
    return run.losses[key]


def etas(question: QuestionConfig, found: Found) -> Groups:
    """By size; of the longest runs. Where the sparse run never gets to the dense one's last loss,
    the dense one's way to the sparse one's stands for it, turned round.
    """
    groups: Groups = {}
    longest = {run.name for run in found.longest(question.of, mixture=question.mixture)}
    for sparse, dense in _twins(question, found):
        if sparse.name in longest:
            folders = [found.folder.run(one.name) for one in (dense, sparse)]
            value = _eta(*folders, loss=question.loss)
            if value is None:
                back = _eta(*reversed(folders), loss=question.loss)
                if back is None:
                    raise NoAnswerError(f"{sparse.name} and {dense.name} share no {question.loss}")
                value = 1 / back
            groups.setdefault(sparse.cell.size, []).append(value)
    return groups


def _eta(dense: Path, sparse: Path, *, loss: str) -> float | None:
    rows = [(one / "evals.jsonl").read_bytes().count(b"\n") for one in (dense, sparse)]
    held_out = min(rows) >= FEWEST_EVALUATIONS
    values = [one.flops for one in eta(dense, sparse, held_out=held_out) if one.loss == loss]
    return values[0] if values else None


def layer_contrasts(question: QuestionConfig, found: Found, *, place: int) -> Groups:
    """By size: the first or last layer's score above the mean of those between."""
    groups: Groups = {}
    for run in found.longest(question.of, mixture=question.mixture):
        scores = experts_of(found.folder.run(run.name))
        contrasts = None if scores is None else estimates.layer_contrasts(scores)
        if contrasts is not None:
            groups.setdefault(run.cell.size, []).append(contrasts[place])
    return groups


def gains(directory: Path) -> Groups:
    """By size: nats by which joint losses are below the mean of the two laws alone."""
    groups: Groups = {}
    with (directory / PAIR_POINTS).open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["trained_on"] == "both":
                gain = float(row["mean_alone"]) - float(row["L"])
                groups.setdefault(row["N"], []).append(gain)
    return groups


def perplexity_ratios(question: QuestionConfig, found: Found) -> Groups:
    """By size, in the direction in which the two are less distinct."""
    first, second = found.study.pairs[str(question.pair)]
    ways: list[Groups] = []
    for own, other in ((first, second), (second, first)):
        groups: Groups = {}
        for run in found.longest(question.of, mixture=own):
            across = across_of(found.folder, run.name, source=other)
            if across is not None:
                own_loss = _loss(found.read(run), f"loss/source/{own}")
                groups.setdefault(run.cell.size, []).append(estimates.perplexity(across - own_loss))
        ways.append(groups)
    there, back = ways
    return {size: min(there[size], back[size], key=mean) for size in there if size in back}


def best_batch(question: QuestionConfig, found: Found) -> Estimate | None:
    """Of all families, because those of a scan differ in their batch; the one with most batches."""
    runs = [found.read(run) for run in found.points if run.cell.mixture == question.pair]
    scans = phenomena.best_batches(runs, loss=question.loss)
    if not scans:
        return None
    widest = max(scans, key=lambda scan: len(scan.batches_tokens))
    estimate = estimates.best_batch(widest)
    if estimate is None:
        lowest = widest.batches_tokens[widest.losses.index(min(widest.losses))]
        raise NoAnswerError(
            f"no parabola inside of those tried; the lowest loss is at {lowest:.0f}"
        )
    return estimate
