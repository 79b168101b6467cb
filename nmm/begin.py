"""How a run begins: what a user can get wrong is checked before any work, by every process."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.corpus import Corpus
from nmm import checkpoint, config, parallel, schedule
from nmm.checkpoint import Progress
from nmm.config import Config
from nmm.engine import Split, split_step
from nmm.errors import UserError
from nmm.log import read_rows
from nmm.model import check_given
from nmm.needs import refuse_missing
from nmm.parallel import World
from nmm.schedule import Phases

T = TypeVar("T")


@dataclass(frozen=True)
class RunPlan:
    """What is known before anything is built: where, on which corpus, how long, split how."""

    directory: Path
    corpus: Corpus
    held_out: Corpus
    split: Split
    phases: Phases


def make_plan(settings: Config, *, world: World) -> RunPlan:
    """Check everything that a user can get wrong, before any work."""
    data, model = settings.data, settings.model
    refuse_missing(model, settings.engine, device=world.device)
    split = split_step(
        data.global_rows, micro_batch=settings.engine.micro_batch, world_size=world.size
    )
    step_tokens = data.global_rows * data.row_tokens
    phases = schedule.phases(settings.schedule, tokens_per_step=step_tokens)
    corpus, held_out = (
        Corpus.open(data, image=model.image, vocab_size=model.vocab_size, split=name)
        for name in ("train", "held_out")
    )
    corpus.check_budget(phases.total_steps * step_tokens, repeat=data.repeat)
    trained_on, tested_on = (
        {path for source in split_of.sources for path in source.paths}
        for split_of in (corpus, held_out)
    )
    if both := sorted(trained_on & tested_on):
        raise UserError(
            f"data.sources names {both[0]} in train and in held_out; change one of the two globs, "
            f"so that nothing is tested on what it was trained on."
        )
    return RunPlan(config.run_directory(settings.run).absolute(), corpus, held_out, split, phases)


def begin(plan: RunPlan, settings: Config, *, world: World) -> tuple[Progress, Path | None]:
    """Where the run stands: its own newest complete checkpoint, else step 0."""
    newest = parallel.from_main(checkpoint.newest(plan.directory) if world.is_main else None)
    checkpoint.check_resume(newest, settings.run.resume, directory=plan.directory)
    identity = checkpoint.identity(
        settings,
        fingerprints={
            "corpus": plan.corpus.fingerprint,
            "held-out": plan.held_out.fingerprint,
        },
        tokenizer_hash=plan.corpus.tokenizer.hash,
        processes=world.size,
    )
    progress = checkpoint.read_progress(newest) if newest else None
    if world.is_main:
        every_steps = settings.checkpoint.every_steps
        refuse_lost_evidence(plan.directory, progress=progress, every_steps=every_steps)
    if newest is None or progress is None:
        check_given(settings.model, settings.weights)
        return Progress(identity=identity), None
    checkpoint.refuse_contradiction(progress.identity, identity, checkpoint=newest)
    refuse_jump(progress, settings, plan=plan)
    return progress, newest


def owes_evaluation(plan: RunPlan, progress: Progress, settings: Config, *, world: World) -> bool:
    """Is the evaluation of the step where the run stands missing, since a stop came before it?"""
    step, config = progress.step, settings.evaluation
    if step == 0:
        return config.at_start
    if not schedule.due(step, every=config.every_steps, last=plan.phases.total_steps):
        return False
    path = plan.directory / "evals.jsonl"
    return parallel.from_main(
        all(row["step"] != step for row in read_rows(path)) if world.is_main else False
    )


def is_finished(plan: RunPlan, progress: Progress, settings: Config, *, world: World) -> bool:
    """Are all steps taken, and the last one evaluated?"""
    if progress.step < plan.phases.total_steps:
        return False
    return not owes_evaluation(plan, progress, settings, world=world)


def refuse_lost_evidence(directory: Path, *, progress: Progress | None, every_steps: int) -> None:
    """Do not begin anew, or go on, over a run whose checkpoints or log somebody removed.

    Checkpoints are due every `every_steps`. All logs are read, so that damage shows before work.
    """
    names = ("losses", "evals", "quarantine")
    rows, *_ = (read_rows(directory / f"{name}.jsonl") for name in names)
    path = directory / "losses.jsonl"
    if progress is None and rows and rows[-1]["step"] > every_steps:
        raise UserError(
            f"{path} reaches step {rows[-1]['step']} but there is no checkpoint to continue from; "
            f"restore {directory / 'checkpoints'}, or start another run with run.name=NEW."
        )
    if progress is None:
        return
    last = max((row["step"] for row in rows if row["step"] <= progress.step), default=0)
    if last < progress.logged_step:
        raise UserError(
            f"{path} ends at step {last} but the checkpoint of step {progress.step} was made when "
            f"it reached {progress.logged_step}; restore the log, or start another run with "
            f"run.name=NEW."
        )


def refuse_jump(progress: Progress, settings: Config, *, plan: RunPlan) -> None:
    """A changed schedule may alter the steps to come, not the one last taken."""
    if progress.step > plan.phases.total_steps:
        raise UserError(
            f"schedule.total_steps is {plan.phases.total_steps} but {plan.directory} is at step "
            f"{progress.step}; restore the old length, or start another run with run.name=NEW."
        )
    rate = schedule.learning_rate(
        settings.schedule, phases=plan.phases, peak=settings.optim.learning_rate, step=progress.step
    )
    if not math.isclose(rate, progress.learning_rate, rel_tol=1e-9, abs_tol=1e-15):
        raise UserError(
            f"schedule.* gives the rate {rate:g} at step {progress.step}, but "
            f"{plan.directory} was trained with {progress.learning_rate:g} there; restore the old "
            f"schedule, or start another run with run.name=NEW."
        )


def agreed(work: Callable[[], T], *, world: World) -> T:
    """The result of `work`, if every process could do it; else the first error, on every process.

    A shard can be missing on one machine only, and the others must not wait for it.
    """
    done, errors = [], []
    try:
        done.append(work())
    except UserError as error:
        errors.append(f"{error}" if world.is_main else f"{error} (process {world.rank})")
    errors = parallel.gather_lists(errors)
    if errors:
        raise UserError(errors[0])
    return done[0]


@contextmanager
def naming_process(world: World) -> Iterator[None]:
    """What only one process meets should say which."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (process {world.rank})") from None
