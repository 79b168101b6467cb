"""How a run begins: what a user can get wrong is checked before any work, by every process."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import codebook
from data.corpus import Corpus
from data.plan import StreamState
from nmm import (
    checkpoint,
    config,
    intact,
    parallel,
    parent,
    rundir,
    saving,
    schedule,
    take_back,
    trace,
)
from nmm.checkpoint import Progress
from nmm.codes.model import read as codes_of
from nmm.config import CheckpointConfig, Config, DataConfig, ParentMode, Resume, UnitModality
from nmm.engine import Split, split_step
from nmm.errors import UserError
from nmm.expert_parallel import refuse_uneven
from nmm.flops import num_parameters
from nmm.identity import identity_of, refuse_contradiction
from nmm.intact import Found
from nmm.log import ALARMS, read_rows
from nmm.model import check_given
from nmm.needs import refuse_missing
from nmm.parallel import World
from nmm.pieces import Written
from nmm.schedule import Phases
from nmm.uploads import url_of


@dataclass(frozen=True)
class RunPlan:
    """What is known before anything is built: where, on which corpus, how long, split how."""

    directory: Path
    corpus: Corpus
    held_out: Corpus
    codebook_sha256: str | None
    split: Split
    phases: Phases


@dataclass(frozen=True)
class Beginning:
    """Where a run stands, and the checkpoint it goes on from: its `own`, else its `parent`'s.

    With neither it begins from scratch. `left_out` says which newer ones of its own are damaged.
    """

    progress: Progress
    own: Path | None = None
    parent: Path | None = None
    mode: ParentMode = ParentMode.branch
    left_out: list[str] = field(default_factory=list)

    @property
    def whole(self) -> Path | None:
        """The checkpoint of which everything is taken, if there is one."""
        return self.own or (self.parent if self.mode is ParentMode.branch else None)

    @property
    def weights(self) -> Path | None:
        """The checkpoint of which the weights are taken and no optimizer state, if there is one."""
        return None if self.own or self.mode is ParentMode.branch else self.parent


def make_plan(settings: Config, *, world: World) -> RunPlan:
    """Check everything that a user can get wrong, before any work."""
    data, model = settings.data, settings.model
    refuse_missing(model, settings.engine, device=world.device)
    refuse_uneven(settings.engine.expert_parallel, world_size=world.size)
    split = split_step(
        data.global_rows,
        micro_batch=settings.engine.micro_batch,
        world_size=world.size,
        group_rows=model.group_rows,
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
    codebook_sha256 = _codebook_sha256(data)
    codebook.check((corpus, held_out), data, sha256=codebook_sha256)
    return RunPlan(
        directory=config.run_directory(settings.run).absolute(),
        corpus=corpus,
        held_out=held_out,
        codebook_sha256=codebook_sha256,
        split=split,
        phases=phases,
    )


def _codebook_sha256(data: DataConfig) -> str | None:
    """Of the VQ model, if one is given: it must be the one that the shards can be of."""
    if data.codebook is None:
        return None
    codes, count = codes_of(data.codebook, key="data.codebook"), data.units[UnitModality.image]
    if codes.codes != count:
        raise UserError(
            f"data.codebook is {data.codebook}, which has {codes.codes} codes, and "
            f"data.units.image is {count}; set data.units.image={codes.codes}, or give the "
            f"codebook that the shards were made with."
        )
    return codes.sha256()


def begin(plan: RunPlan, settings: Config, *, world: World) -> Beginning:
    """Its own newest intact checkpoint, else its parent's, else step 0; raises UserError."""
    found, lost = _newest(plan, settings, world=world)
    newest = found.checkpoint
    checkpoint.check_resume(newest, settings.run.resume, directory=plan.directory)
    identity = identity_of(
        settings, corpus=plan.corpus, held_out=plan.held_out, codebook=plan.codebook_sha256
    )
    if newest:
        progress = checkpoint.read_progress(newest)
        begun = Beginning(progress, own=newest, left_out=[*lost, *found.sentences()])
    elif settings.parent.run:
        begun = _from_parent(plan, settings, identity=identity, world=world)
    else:
        begun = Beginning(Progress(identity=identity))
    if world.is_main:
        refuse_lost_evidence(plan.directory, begun, config=settings.checkpoint)
    if newest:
        refuse_contradiction(begun.progress.identity, identity, checkpoint=newest)
    elif begun.parent is None:
        check_given(settings.model, settings.weights, tokenizer_hash=plan.corpus.tokenizer.hash)
    if begun.progress.step:
        refuse_jump(begun, settings, plan=plan)
    trace.refuse_outside(
        settings.log.profile_steps,
        after=0 if begun.own else begun.progress.step,
        last=plan.phases.total_steps,
    )
    return begun


def _newest(plan: RunPlan, settings: Config, *, world: World) -> tuple[Found, list[str]]:
    """The newest intact checkpoint here, else a copy, and what is wrong with newer copies."""
    has_copies = settings.checkpoint.upload_to is not None
    here = intact.newest_intact(plan.directory, world=world, has_copies=has_copies)
    if here.checkpoint or not has_copies:
        return here, []
    lost = parallel.agreed(lambda: _take_back(plan, settings, world=world), world=world)
    found = intact.newest_intact(plan.directory, world=world)  # none is, where there was no copy
    return Found(found.checkpoint, here.faults), lost


def _take_back(plan: RunPlan, settings: Config, *, world: World) -> list[str]:
    """The newest copy of a run whose disk was lost, by the main process; what the user must know.

    Raises UserError also where nobody can tell whether there is one: the run began already, maybe.
    """
    wanted = settings.checkpoint.upload_to
    if wanted is None or not world.is_main:
        return []
    url = url_of(wanted, directory=plan.directory)
    if settings.run.resume is Resume.never:
        if found := take_back.names(url):
            raise UserError(
                f"run.resume is never but {url} has a copy of {found[-1]}; set run.resume=auto to "
                f"continue it, or choose another run.name."
            )
        return []
    taken, lost = take_back.newest(url, plan.directory)
    if taken:
        print(f"took {taken} back from {url}", flush=True)
    return lost


def _from_parent(
    plan: RunPlan, settings: Config, *, identity: dict[str, Any], world: World
) -> Beginning:
    asked, data, total_steps = settings.parent, settings.data, plan.phases.total_steps
    found = parallel.agreed(lambda: parent.checkpoint_of(asked), world=world)
    intact.refuse_damaged(found, remedy=parent.GIVE_ANOTHER, world=world)
    progress = parent.begun_from(
        found,
        mode=asked.mode,
        identity=identity,
        total_steps=total_steps,
        model=settings.model,
    )
    if progress.stream and progress.step == 0:  # steps to come are more than those of the schedule
        behind = StreamState.from_dict(progress.stream)
        rows = behind.rows + behind.row + total_steps * data.global_rows
        plan.corpus.check_budget(rows * data.row_tokens, repeat=data.repeat)
    return Beginning(progress, parent=found, mode=asked.mode)


def opening(plan: RunPlan, begun: Beginning, written: Written | None) -> str:
    """What the run says first: where it stands, and what it begins from."""
    progress, came_from = begun.progress, ""
    if begun.parent and progress.parent:
        taken = {
            ParentMode.branch: "of",
            ParentMode.weights: "with the weights of",
            ParentMode.upcycle: "with experts made of",
            ParentMode.auxiliary_routers: "with auxiliary routers for",
        }[begun.mode]
        came_from = f", {taken} {begun.parent} ({progress.parent['tokens']:,} tokens)"
    if written:
        writers = f"{written.processes} process{'' if written.processes == 1 else 'es'}"
        came_from += f", written by {writers} with ZeRO {written.zero_stage}"
    return (
        f"{'continuing' if begun.own else 'starting'} {plan.directory} after step {progress.step} "
        f"of {plan.phases.total_steps}{came_from}"
    )


def write_run_directory(
    plan: RunPlan, settings: Config, *, overrides: list[str], first: Progress, world: World
) -> None:
    """config.yaml, overrides.txt and manifest.json, by the main process."""
    if not world.is_main:
        return
    parameters = num_parameters(settings.model)
    rundir.write(
        plan.directory,
        config_yaml=config.to_yaml(config.with_absolute_paths(settings)),
        overrides=overrides,
        facts={
            "N": parameters.N,
            "N_active": parameters.N_active,
            "N_vision": parameters.N_vision,
            "parameters_total": parameters.total,
            "vocab_size": settings.model.vocab_size,
            "tokenizer_sha256": plan.corpus.tokenizer.hash,
            "codebook_sha256": plan.codebook_sha256,
            "corpus_fingerprint": plan.corpus.fingerprint,
            "source_tokens": {source.name: source.tokens for source in plan.corpus.sources},
            "total_steps": plan.phases.total_steps,
            "parent": first.parent,
        },
        start={"step": first.step, "processes": world.size},
    )


def owes_evaluation(plan: RunPlan, progress: Progress, settings: Config, *, world: World) -> bool:
    """Is the evaluation of the step where the run stands missing, since a stop came before it?"""
    step, config = progress.step, settings.evaluation
    at_start = config.at_start and step == progress.first_step
    if step == 0:
        return at_start
    due = schedule.due(step, every=config.every_steps, last=plan.phases.total_steps)
    if not due and not at_start:
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


def refuse_lost_evidence(directory: Path, begun: Beginning, *, config: CheckpointConfig) -> None:
    """Do not begin anew, or go on, over a run whose checkpoints or log somebody removed.

    A run that could not write any checkpoint yet has lost none. All logs are read, so that damage
    shows before work.
    """
    names = ("losses", "evals", "quarantine")
    rows, *_ = (read_rows(directory / f"{name}.jsonl") for name in names)
    path, progress = directory / "losses.jsonl", begun.progress
    if begun.own is None and rows and rows[-1]["step"] > first_try(directory, progress, config):
        raise UserError(
            f"{path} reaches step {rows[-1]['step']} but there is no checkpoint to continue from; "
            f"restore {directory / 'checkpoints'}, or start another run with run.name=NEW."
        )
    if begun.own is None:
        return
    last = max((row["step"] for row in rows if row["step"] <= progress.step), default=0)
    if last < progress.logged_step:
        raise UserError(
            f"{path} ends at step {last} but the checkpoint of step {progress.step} was made when "
            f"it reached {progress.logged_step}; restore the log, or start another run with "
            f"run.name=NEW."
        )


def first_try(directory: Path, progress: Progress, config: CheckpointConfig) -> int:
    """After which step the first checkpoint was due that no alarm says was not written."""
    first = (progress.first_step // config.every_steps + 1) * config.every_steps
    for row in read_rows(directory / ALARMS):
        if row["about"] == saving.ABOUT and row["step"] <= first:  # else one was written before it
            first = max(first, saving.next_try(row["step"], config))
    return first


def refuse_jump(begun: Beginning, settings: Config, *, plan: RunPlan) -> None:
    """A changed schedule may alter the steps to come, not the one last taken."""
    progress = begun.progress
    if progress.step > plan.phases.total_steps:
        raise UserError(
            f"schedule.total_steps is {plan.phases.total_steps} but {plan.directory} is at step "
            f"{progress.step}; restore the old length, or start another run with run.name=NEW."
        )
    rate = schedule.learning_rate(
        settings.schedule, phases=plan.phases, peak=settings.optim.learning_rate, step=progress.step
    )
    if math.isclose(rate, progress.learning_rate, rel_tol=1e-9, abs_tol=1e-15):
        return
    trained = plan.directory if begun.parent is None else begun.parent.parents[1]
    remedy = (
        "restore the old schedule, or start another run with run.name=NEW"
        if begun.parent is None
        else "branch off where both schedules have the same rate, as in the constant phase"
    )
    raise UserError(
        f"schedule.* gives the rate {rate:g} at step {progress.step}, but {trained} was trained "
        f"with {progress.learning_rate:g} there; {remedy}."
    )
