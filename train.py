"""Train a model: plan and begin (nmm/begin.py), build, loop. See `python train.py --help`."""

import math
import os
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from data.loader import Loader
from nmm import (
    checkpoint,
    config,
    copies,
    fault,
    held_out,
    intact,
    parallel,
    parent,
    quarantine,
    rows,
    rundir,
    schedule,
    skipped,
    stop,
)
from nmm.batch import PackedBatch
from nmm.begin import (
    Beginning,
    RunPlan,
    begin,
    is_finished,
    make_plan,
    opening,
    owes_evaluation,
    write_run_directory,
)
from nmm.checkpoint import Progress
from nmm.config import Config
from nmm.engine import Engine
from nmm.errors import DivergenceError, UserError
from nmm.heartbeat import Heartbeat, Phase
from nmm.log import RunLog
from nmm.model import build, load_given
from nmm.parallel import World, agreed, naming_process
from nmm.pieces import Written
from nmm.saving import Saves
from nmm.schedule import at_interval, due
from nmm.stop import Stopped, Stops
from nmm.trace import traced
from nmm.uploads import Uploads, url_of


def train(
    plan: RunPlan,
    begun: Beginning,
    *,
    settings: Config,
    stops: Stops,
    heartbeat: Heartbeat,
    world: World,
) -> None:
    """Train from where the run stands to the last step; raises Stopped when asked to stop."""
    progress = begun.progress
    engine = build_engine(plan, begun, settings, world=world)
    parallel.limit_waiting(settings.run.timeout_minutes)
    written = load(engine, begun, world=world) if begun.whole else None
    loader = Loader(
        plan.corpus,
        settings.data,
        rank=world.rank,
        world=world.size,
        micro_batch=plan.split.micro_batch,
        workers=settings.data.workers,
        state=progress.stream,
    )
    with (
        closing(open_log(plan, progress, settings, heartbeat=heartbeat, world=world)) as log,
        traced(
            settings.log.profile_steps,
            plan.directory,
            heartbeat=heartbeat,
            rank=world.rank,
            device=world.device,
        ),
        closing(open_uploads(plan, log, settings, world=world)) as uploads,
    ):
        for sentence in begun.left_out:
            log.alarm(sentence, step=progress.step, about="damage")
        log.say(opening(plan, begun, written))
        saving = saves(plan, engine, log, uploads, settings, world=world)
        if begun.own:
            uploads.offer(begun.own)  # if the start before had no time for it
        try:
            loop(
                plan,
                progress,
                engine,
                loader,
                saving,
                log,
                settings=settings,
                stops=stops,
                world=world,
            )
        except Stopped as stopped:
            if not checkpoint.is_saved(plan.directory, progress, world=world):
                saving.save_at_the_end(progress)
            log.say(
                f"stopped {plan.directory} after step {progress.step} of "
                f"{plan.phases.total_steps}, because {stopped}; the same command continues it."
            )
            raise
        log.heartbeat.enter(Phase.end)  # the last checkpoint is complete; its copy may take long
        uploads.finish(patience_seconds=30 * settings.run.timeout_minutes)
        tokens = progress.totals["tokens"]
        log.say(f"finished {plan.directory}: {progress.step} steps, {tokens:,} tokens")


def loop(
    plan: RunPlan,
    progress: Progress,
    engine: Engine,
    loader: Loader,
    saving: Saves,
    log: RunLog,
    *,
    settings: Config,
    stops: Stops,
    world: World,
) -> None:
    """Step by step: read, update, count, and what is due of log, evaluation and checkpoint."""
    total_steps = plan.phases.total_steps
    sources = [source.name for source in plan.corpus.sources]
    batches = iter(loader)
    if owes_evaluation(plan, progress, settings, world=world):
        evaluation(engine, plan, progress, log, settings=settings, stops=stops, world=world)
    while progress.step < total_steps:
        log.heartbeat.enter(Phase.between)
        stops.check()
        started = time.perf_counter()
        step = progress.step + 1
        rate = schedule.learning_rate(
            settings.schedule, phases=plan.phases, peak=settings.optim.learning_rate, step=step
        )
        log.heartbeat.enter(Phase.data, step=step)
        with naming_process(world):
            micro_batches, stream = next(batches)
        log.heartbeat.hold([batch.flat_keys for batch in micro_batches])
        watch = at_interval(step, every=settings.log.signals_every_steps)
        result = engine.train_step(
            micro_batches, learning_rate=rate, watch=watch, enter=log.heartbeat.enter
        )
        log.heartbeat.enter(Phase.between)
        progress.step, progress.stream, progress.learning_rate = step, stream, rate
        rows.count(progress.totals, result, settings=settings, sources=sources)
        skipped.count(progress, result)
        if not result.applied:
            log.skipped(skipped.row(progress, result))
        for document in result.dropped:
            log.quarantine({"step": step, "split": "train", **vars(document)})
        quarantine.refuse_bad_windows(
            progress,
            result.dropped,
            max_bad_fraction=settings.data.max_bad_fraction,
            directory=plan.directory,
        )

        is_due = due(step, every=settings.log.every_steps, last=total_steps)
        if watch or is_due or not result.applied:
            when = rows.now(plan.phases, progress)
            losses = rows.losses(progress, result, settings, sources=sources)
            timing = rows.speed(
                result, settings, started=started, heartbeat=log.heartbeat, world=world
            )
            log.losses({**when, **losses, **timing})
            progress.logged_step = step
        skipped.refuse_many(
            progress, result, limit=settings.engine.max_skipped_in_a_row, directory=plan.directory
        )
        if due(step, every=settings.evaluation.every_steps, last=total_steps):
            evaluation(engine, plan, progress, log, settings=settings, stops=stops, world=world)
        saving.save_if_due(progress)


def load(engine: Engine, begun: Beginning, *, world: World) -> Written:
    """Put the checkpoint that the run goes on from into the engine, however it was written."""
    assert begun.whole is not None
    remedy = intact.DELETE if begun.own else parent.GIVE_ANOTHER
    say = partial(print, flush=True) if world.is_main else lambda _: None
    with naming_process(world):
        return intact.load(engine, begun.whole, say=say, remedy=remedy)


def open_uploads(plan: RunPlan, log: RunLog, settings: Config, *, world: World) -> Uploads:
    """By the main process, which sees the files of all."""
    wanted = settings.checkpoint.upload_to if world.is_main else None
    return Uploads(url_of(wanted, directory=plan.directory) if wanted else None, log=log)


def copy_last(settings: Config, begun: Beginning, *, directory: Path, stops: Stops) -> None:
    """Copy the last checkpoint of a finished run, if the run could not; a failure ends nothing.

    By the main process alone, which ends it between two files when it is asked to stop.
    """
    wanted = settings.checkpoint.upload_to
    if wanted is None or begun.own is None:
        return
    name, url = begun.own.name, url_of(wanted, directory=directory)
    print(f"copying {name} to {url}, where it is not there yet", flush=True)
    try:
        copies.put(begun.own, f"{url}/{name}", between=stops.check_alone)
    except (UserError, OSError) as error:
        print(f"ALARM: {name} is not copied: {error}", file=sys.stderr)
    except Stopped as stopped:
        stops.obeyed()
        said = f"ALARM: {name} is not copied, because {stopped}; the same command copies it."
        print(said, file=sys.stderr)


def saves(
    plan: RunPlan,
    engine: Engine,
    log: RunLog,
    uploads: Uploads,
    settings: Config,
    *,
    world: World,
) -> Saves:
    return Saves(
        engine,
        plan.directory,
        settings.checkpoint,
        last_step=plan.phases.total_steps,
        log=log,
        uploads=uploads,
        world=world,
    )


def build_engine(plan: RunPlan, begun: Beginning, settings: Config, *, world: World) -> Engine:
    """The model on its engine, with the weights that a run begins with; what is loaded whole is
    loaded later.
    """
    model = build(settings.model, seed=settings.run.seed)
    if begun.weights:
        parent.load_weights(model, begun.weights, mode=begun.mode, world=world)
    elif begun.whole is None:
        load_given(model, settings.weights)
    return Engine(
        model,
        config=settings.engine,
        optim=settings.optim,
        split=plan.split,
        num_sources=len(plan.corpus.sources),
        world=world,
        seed=settings.run.seed,
    )


def open_log(
    plan: RunPlan, progress: Progress, settings: Config, *, heartbeat: Heartbeat, world: World
) -> RunLog:
    return RunLog(
        plan.directory,
        settings.log,
        is_main=world.is_main,
        settings=config.to_dict(settings),
        first_step=progress.step,
        total_steps=plan.phases.total_steps,
        heartbeat=heartbeat,
    )


def evaluation(
    engine: Engine,
    plan: RunPlan,
    progress: Progress,
    log: RunLog,
    *,
    settings: Config,
    stops: Stops,
    world: World,
) -> None:
    """Log the held-out losses beside what was trained on so far, and what could not be read.

    Raises Stopped, and then logs nothing.
    """

    def between(batch: PackedBatch) -> None:
        log.heartbeat.hold([batch.flat_keys])
        log.heartbeat.enter(Phase.evaluation)
        stops.check()

    losses, dropped = held_out.evaluate(
        engine.model,
        plan.held_out,
        settings.data,
        config=settings.model,
        rows_per_source=settings.evaluation.rows_per_source,
        micro_batch=plan.split.micro_batch,
        world=world,
        between=between,
    )
    for document in dropped:
        log.quarantine({"step": progress.step, "split": "held_out", **vars(document)})
    if losses["loss"] is not None and not math.isfinite(losses["loss"]):
        raise DivergenceError(
            f"the held-out loss after step {progress.step} is {losses['loss']}; start another run "
            f"(run.name=NEW) with a lower optim.learning_rate."
        )
    trained = {key: progress.totals.get(key, 0) for key in ("tokens", "flops")}
    losses |= held_out.objective(settings.data)
    when = rows.now(plan.phases, progress)
    log.evaluation({**when, **trained, **losses, "dropped": len(dropped)})


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    """The border between the command line and typed code."""
    try:
        run(config.load(composed), overrides=list(HydraConfig.get().overrides.task))
    except UserError as error:
        leave(error)


def run(settings: Config, *, overrides: list[str]) -> None:
    """Plan, begin, and train what is left. Exits with stop.EXIT_CODE when asked to stop."""
    world = parallel.start(timeout_minutes=settings.run.timeout_minutes)
    directory = config.run_directory(settings.run).absolute()
    stops = stop.listen(directory, max_minutes=settings.run.max_minutes, world=world)
    try:
        finished = run_in(world, settings, overrides=overrides, stops=stops)
    finally:
        parallel.stop()
    if not finished:
        stop.tell_elastic_agent()
        sys.exit(stop.EXIT_CODE)


def run_in(world: World, settings: Config, *, overrides: list[str], stops: Stops) -> bool:
    """The run among processes that have met already; False when it was asked to stop."""
    directory, progress = config.run_directory(settings.run).absolute(), Progress()
    with fault.ending_together(world, directory, where=lambda: after(progress)):
        plan = agreed(lambda: make_plan(settings, world=world), world=world)
        with agreed(lambda: rundir.lock(directory, is_main=world.is_main), world=world):
            begun = agreed(lambda: begin(plan, settings, world=world), world=world)
            progress = begun.progress
            if is_finished(plan, progress, settings, world=world):
                if world.is_main:
                    print(f"{directory} is finished: all {progress.step} steps are done.")
                    copy_last(settings, begun, directory=directory, stops=stops)
                return True
            agreed(
                lambda: write_run_directory(
                    plan, settings, overrides=overrides, first=progress, world=world
                ),
                world=world,
            )
            how = "finished"
            try:
                with fault.watched(
                    directory,
                    timeout_minutes=settings.run.timeout_minutes,
                    world=world,
                    where=lambda: after(progress),
                ) as heartbeat:
                    train(
                        plan,
                        begun,
                        settings=settings,
                        stops=stops,
                        heartbeat=heartbeat,
                        world=world,
                    )
            except Stopped:
                how = "stopped"
            except DivergenceError:
                rundir.end(directory, how="diverged", step=progress.step, is_main=world.is_main)
                raise
            stops.obeyed()
            rundir.end(directory, how=how, step=progress.step, is_main=world.is_main)
            parallel.barrier()  # launchers of other machines read the note when we have left
            return how == "finished"


def after(progress: Progress) -> str:
    """Where a run was, for what is said about its end."""
    return f"after step {progress.step}"


def leave(error: Exception) -> NoReturn:
    """Exit with one sentence; every process meets the same error, the main one says it."""
    is_main = os.environ.get("RANK", "0") == "0"
    sys.exit(f"error: {config.sentence(error)}" if is_main else 1)


if __name__ == "__main__":
    config.register()
    # The deepspeed launcher adds --local_rank=N, which Hydra would refuse; the environment says it.
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on, instead of printing a page
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        leave(error)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from the last checkpoint")
