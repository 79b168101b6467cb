"""The end of a run before its last step: asked for by a signal, a file or the clock.

Any process may be asked, at any time; all of them end together, at the next place where they ask
each other: before a step, and between the micro-batches of an evaluation.
"""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from nmm.parallel import World, add_over_ranks

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again; launchers requeue on it
FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_BETWEEN_LOOKS = 1.0  # for the file: a look at a shared file system is not free


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to end, and all processes know; the message says by what."""


class Stops:
    """Knows who asked the run in `directory` to end; its clock starts now."""

    def __init__(self, directory: Path, *, max_minutes: float | None, world: World) -> None:
        self.file, self._world = directory / FILE, world
        self._signals: set[int] = set()
        self._ends = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._max_minutes, self._looked_at = max_minutes, -SECONDS_BETWEEN_LOOKS

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGNALS: remember, and go on with what is being done."""
        self._signals.add(number)

    def check(self) -> None:
        """Raise Stopped, on all processes or on none; all call it together.

        One sum of four small integers per call.
        """
        asked = torch.tensor(self._here(), dtype=torch.int32, device=self._world.device)
        if self._world.size > 1:
            add_over_ranks(asked)
        self._raise_if(asked.tolist())

    def check_alone(self) -> None:
        """The same of this process alone, where the others have nothing to end."""
        self._raise_if(self._here())

    def _here(self) -> list[int]:
        """Of everything that may ask: does it?"""
        signals = [number in self._signals for number in SIGNALS]
        return [*signals, self._file_is_there(), self._time_is_up()]

    def _raise_if(self, asked: list[int]) -> None:
        for reason, times in zip(self._reasons(), asked, strict=True):
            if times:
                raise Stopped(reason())

    def _reasons(self) -> list[Callable[[], str]]:
        """Of what `check` adds up, in its order."""
        signals = [partial("{} was received".format, number.name) for number in SIGNALS]
        return [*signals, self._file_says, lambda: f"run.max_minutes={self._max_minutes} passed"]

    def obeyed(self) -> None:
        """The file has served: it must not stop the next start."""
        if self._world.is_main:
            self.file.unlink(missing_ok=True)

    def _file_says(self) -> str:
        """Who made it may have written why."""
        said = self.file.read_text().strip() if self.file.exists() else ""
        return f"{self.file} is there" + (f" ({said})" if said else "")

    def _file_is_there(self) -> bool:
        if not self._world.is_main:
            return False
        now = time.monotonic()
        if now - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return False
        self._looked_at = now
        return self.file.exists()

    def _time_is_up(self) -> bool:
        return self._ends is not None and self._world.is_main and time.monotonic() >= self._ends


def listen(directory: Path, *, max_minutes: float | None, world: World) -> Stops:
    """Stops that receive SIGNALS from now until the process ends; their default is death."""
    stops = Stops(directory, max_minutes=max_minutes, world=world)
    for number in SIGNALS:
        signal.signal(number, stops.receive)
    return stops


def tell_elastic_agent() -> None:
    """Keep torchrun --max-restarts from starting again what was asked to stop.

    Its agent, our parent, restarts after any exit code but 0; a signal it takes as the end.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and os.environ["LOCAL_RANK"] == "0":
        os.kill(os.getppid(), signal.SIGHUP)
