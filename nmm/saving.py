"""When a run saves itself, and what it does when that fails: say so, go on, and try again soon."""

import time
from pathlib import Path

from nmm import checkpoint
from nmm.checkpoint import Progress
from nmm.config import CheckpointConfig
from nmm.engine import Engine
from nmm.errors import UserError
from nmm.heartbeat import Phase
from nmm.log import RunLog
from nmm.parallel import Unwritten, World, writing_together
from nmm.uploads import Uploads

ABOUT = "checkpoint"  # of rows of alarms.jsonl
RETRIES_PER_INTERVAL = 10
# Before the run ends without its last checkpoint; all of it fits into the patience of schedulers.
PAUSES_SECONDS = (1.0, 2.0)


def next_try(step: int, config: CheckpointConfig) -> int:
    """The step after which a checkpoint that could not be written is tried again."""
    return step + max(1, config.every_steps // RETRIES_PER_INTERVAL)


class Saves:
    """The checkpoints of a run that ends with `last_step`; all processes call all together."""

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        config: CheckpointConfig,
        *,
        last_step: int,
        log: RunLog,
        uploads: Uploads,
        world: World,
    ) -> None:
        self._engine, self._directory, self._config = engine, directory, config
        self._last_step, self._log, self._uploads = last_step, log, uploads
        self._world = world
        self._retry_step: int | None = None
        self._owes_kept = False

    def save_if_due(self, progress: Progress) -> None:
        """At the end of every step; raises UserError when the last one cannot be written."""
        self._uploads.poll()
        step, again = progress.step, next_try(progress.step, self._config)
        if step == self._last_step:
            self.save_at_the_end(progress)
        elif step == self._retry_step or checkpoint.is_due(
            step, self._config, last=self._last_step
        ):
            failed = self._save(progress, then=f"the next try is after step {again}")
            self._retry_step = again if failed else None

    def save_at_the_end(self, progress: Progress) -> None:
        """There is no later step; raises UserError after the last of some tries."""
        failed = None
        for pause in (*PAUSES_SECONDS, None):
            then = "the run ends" if pause is None else f"the next try is in {pause:g} seconds"
            failed = self._save(progress, then=then)
            if failed is None:
                return
            time.sleep(pause or 0)
        raise UserError(
            f"no checkpoint of step {progress.step} could be written ({failed}); make room, and "
            f"the same command takes the steps since the newest checkpoint again."
        )

    def _save(self, progress: Progress, *, then: str) -> str | None:
        """Why it failed, if it did; that is an alarm."""
        self._log.heartbeat.enter(Phase.checkpoint)
        try:
            with writing_together():
                self._log.sync()  # a checkpoint must not be ahead of its logs
            saved = checkpoint.save(
                self._engine,
                progress,
                directory=self._directory,
                config=self._config,
                world=self._world,
                keep=self._owes_kept,
                held=self._uploads.held,
            )
        except Unwritten as error:
            said = f"no checkpoint after step {progress.step}: {error}; {then}"
            self._log.alarm(said, step=progress.step, about=ABOUT)
            # Where this one was to be kept for good, the next one is instead.
            self._owes_kept |= checkpoint.is_kept(progress.step, self._config)
            return f"{error}"
        self._owes_kept = False
        self._uploads.offer(saved)
        return None
