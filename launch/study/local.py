"""Run a study on this machine: some runs at a time, each a process that outlives the launcher.

Every run is a session of its own, so that Ctrl-C reaches the launcher alone, which then asks the
runs to stop. One that a killed launcher left behind holds its lock; it is waited for.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch.study.costs import Rates, rates
from launch.study.processes import STOP_SIGNALS, Process, start
from launch.study.run import StudyRun
from launch.study.state import (
    STILL,
    Folder,
    Standing,
    State,
    consequences,
    last_step,
    parent_step,
    standing,
    standings_of,
)
from launch.study.table import done_fraction, summary
from launch.torchrun import EXIT_CODES
from nmm.config import StudyConfig
from nmm.log import duration

SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_BETWEEN_LINES = (5.0, 30.0)  # of the progress: on a terminal, elsewhere
STOPPED = EXIT_CODES["stopped"]


@dataclass
class Local:
    """The runs of a study and the processes that train them; `asked` says why to stop."""

    study: StudyConfig
    runs: Sequence[StudyRun]
    folder: Folder
    processes: dict[str, Process] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def go(self) -> bool:
        """Until nothing more can be started; False when asked to stop before that."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        minutes = self.study.max_minutes
        deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.standings = standings_of(self.runs, self.folder, retries=self.study.retries)
        progress, told = Progress(self.runs, self.folder, self.study), 0
        while True:
            if time.monotonic() >= deadline and not self.asked:
                self.asked.append(f"study.max_minutes={minutes} passed")
            if len(self.asked) > told:
                self._stop_all(at_once=told > 0)
                told = len(self.asked)
            if not told:
                self._start_what_can()
            if not self._running():
                progress.show(self.standings, last=True)
                return not told
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self._look()
            progress.show(self.standings)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(f"{signal.Signals(number).name} was received")

    def _running(self) -> list[StudyRun]:
        return [run for run in self.runs if self.standings[run.name].state is State.running]

    def _start_what_can(self) -> None:
        """The costliest first, so that no long run is left alone in the end."""
        free = self.study.parallel - sum(run.cell.slots for run in self._running())
        waiting = [run for run in self.runs if self.standings[run.name].state in STILL]
        for run in sorted(waiting, key=lambda run: -run.cell.flops(1)):
            alone = free == self.study.parallel
            if run.cell.slots <= free or (alone and free):
                step = None if run.trunk is None else parent_step(run, self.folder)
                if run.trunk is None or step is not None:
                    self._start(run, step=step)
                    free -= run.cell.slots

    def _start(self, run: StudyRun, *, step: int | None) -> None:
        words = run.words(runs=self.folder.runs, group=self.study.name, parent_step=step)
        output = output_of(run.name, self.folder)
        self.processes[run.name] = start(words, processes=self.study.processes, output=output)
        self.standings[run.name] = Standing(State.running, self.standings[run.name].step)

    def _look(self) -> None:
        """What became of the runs that were running."""
        for run in self._running():
            process = self.processes.get(run.name)
            if process is None:
                self.standings[run.name] = self._standing(run)
            elif (code := process.poll()) is None:
                step = last_step(self.folder.run(run.name))
                self.standings[run.name] = Standing(State.running, step)
            else:
                del self.processes[run.name]
                self._ended(run, code=code)

    def _ended(self, run: StudyRun, *, code: int) -> None:
        found = self._standing(run)
        undone = found.state in STILL
        if undone and code != STOPPED and not self.asked:
            said = last_line(output_of(run.name, self.folder))
            self.folder.add_failure(run.name, said=f"exit code {code}: {said}")
            found = self._standing(run)
            print(f"failed: {run.name}: exit code {code}: {said}", flush=True)
        self.standings[run.name] = found
        self.standings |= consequences(self.runs, self.standings, folder=self.folder)
        if not undone:
            print(f"{found.state.value}: {run.name} {found.note}".rstrip(), flush=True)

    def _standing(self, run: StudyRun) -> Standing:
        failures = self.folder.failures().get(run.name, [])
        return standing(run, self.folder, failures=failures, retries=self.study.retries)

    def _stop_all(self, *, at_once: bool) -> None:
        """With a checkpoint; `at_once` without, for those who asked a second time."""
        print(f"stopping, because {self.asked[-1]}", flush=True)
        for run in self._running():
            process = self.processes.get(run.name)
            if process is None:  # another launcher's, which is gone
                (self.folder.run(run.name) / "STOP").write_text(self.asked[-1])
            elif at_once:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            else:
                os.kill(process.pid, signal.SIGTERM)


@dataclass
class Progress:
    """A line now and then about the whole study."""

    runs: Sequence[StudyRun]
    folder: Folder
    study: StudyConfig
    shown_at: float = 0.0
    began_at: float = field(default_factory=time.monotonic)
    first_fraction: float | None = None

    def show(self, standings: Mapping[str, Standing], *, last: bool = False) -> None:
        """If it is time for a line, or it is the `last` one."""
        tty = sys.stdout.isatty()
        now = time.monotonic()
        if not last and now - self.shown_at < SECONDS_BETWEEN_LINES[0 if tty else 1]:
            return
        self.shown_at = now
        speed = rates(self.runs, self.folder, device=self.study.device)
        line = summary(self.runs, standings, speed)
        running = [name for name, one in standings.items() if one.state is State.running]
        eta = self._seconds_left(standings, speed)
        at = ", ".join(f"{name} at {standings[name].step}" for name in running)
        line += f", ETA {duration(eta)}: {at}" if running else ""
        end = "\r" if tty and not last else "\n"
        print(line + ("\x1b[K" if tty else ""), end=end, flush=True)

    def _seconds_left(self, standings: Mapping[str, Standing], speed: Rates) -> float:
        """At the pace since the launcher began, once there is one."""
        done = done_fraction(self.runs, standings, rates=speed)
        if self.first_fraction is None:
            self.first_fraction = done
        gained, elapsed = done - self.first_fraction, time.monotonic() - self.began_at
        if gained > 0.01:
            return (1 - done) / gained * elapsed
        total = sum(speed.seconds(run) for run in self.runs)
        return (1 - done) * total / self.study.parallel


def output_of(name: str, folder: Folder) -> Path:
    """Where what a run prints is kept."""
    return folder.notes / "output" / f"{name}.log"


def last_line(path: Path) -> str:
    """What a program said in the end."""
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
