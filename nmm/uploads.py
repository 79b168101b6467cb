"""The checkpoints of a run on their way into an object store, in a process beside it.

One is copied at a time and at most one waits, the newest: a slow store never makes more work than
it can do. A store that fails is an alarm and another try, later and later.
"""

import subprocess
import sys
import time
from pathlib import Path

from nmm.log import RunLog

ABOUT = "upload"  # of rows of alarms.jsonl
LONGEST_PAUSE_SECONDS = 1800.0
TRIES_AT_THE_END = 3
ROOT = Path(__file__).resolve().parent.parent


def url_of(upload_to: str, *, directory: Path) -> str:
    """Where the copies of a run are."""
    return f"{upload_to.rstrip('/')}/{directory.name}"


class Uploads:
    """What is `held` must stay on the disk; without a `url` nothing ever happens."""

    def __init__(self, url: str | None, *, log: RunLog) -> None:
        self._url, self._log = url, log
        self._process: subprocess.Popen | None = None
        self._current: Path | None = None
        self._waiting: Path | None = None
        self._failures, self._not_before = 0, 0.0

    @property
    def held(self) -> list[Path]:
        """The checkpoints that are being copied or wait for it."""
        return [path for path in (self._current, self._waiting) if path]

    def offer(self, checkpoint: Path) -> None:
        """Copy this one next, instead of an older one that waits."""
        if self._url is None:
            return
        self.poll()
        if self._waiting and self._waiting != checkpoint:
            self._log.say(f"{self._waiting.name} is not copied: {checkpoint.name} takes its place")
        self._waiting = checkpoint
        self.poll()

    def poll(self) -> None:
        """Between steps: what has ended, and what can begin? It does not wait."""
        if self._process and self._current and self._process.poll() is not None:
            self._ended(self._process, self._current)
        if self._process is None and self._waiting and time.monotonic() >= self._not_before:
            self._begin(self._waiting)

    def finish(self, *, patience_seconds: float) -> None:
        """At the end of a run: wait for the last one, within limits; raises nothing."""
        end, failures = time.monotonic() + patience_seconds, self._failures
        self._not_before = 0.0
        self.poll()
        while self.held:
            left = end - time.monotonic()
            if left <= 0 or self._failures - failures >= TRIES_AT_THE_END:
                self._alarm(
                    self.held[-1], why="the run ends before that; the same command copies it"
                )
                break
            if self._process:
                try:
                    self._process.wait(left)
                except subprocess.TimeoutExpired:
                    continue
            else:
                time.sleep(min(left, max(0.0, self._not_before - time.monotonic())))
            self.poll()

    def close(self) -> None:
        """Nothing of it goes on."""
        if self._process:
            self._process.kill()
            self._process.communicate()

    def _begin(self, checkpoint: Path) -> None:
        self._current, self._waiting = checkpoint, None
        command = [sys.executable, "-m", "nmm.copies", str(checkpoint)]
        try:
            self._process = subprocess.Popen(
                [*command, f"{self._url}/{checkpoint.name}"],
                cwd=ROOT,
                stdin=subprocess.PIPE,  # it ends when this process does
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:  # no memory for it, or no process
            self._failed(checkpoint, why=f"{error}.")

    def _ended(self, process: subprocess.Popen, checkpoint: Path) -> None:
        _, said = process.communicate()
        self._process = None
        if process.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            self._failed(checkpoint, why=lines[-1] if lines else f"{process.returncode}.")
            return
        self._failures, self._current = 0, None
        self._log.say(f"copied {checkpoint.name} to {self._url}")

    def _failed(self, checkpoint: Path, *, why: str) -> None:
        """It waits again, unless a newer one does."""
        pause = min(2.0 ** min(self._failures, 11), LONGEST_PAUSE_SECONDS)
        self._failures, self._not_before = self._failures + 1, time.monotonic() + pause
        self._current, self._waiting = None, self._waiting or checkpoint
        self._alarm(checkpoint, why=f"{why} The next try is in {pause:g} seconds")

    def _alarm(self, checkpoint: Path, *, why: str) -> None:
        step = int(checkpoint.name.rpartition("_")[2])
        self._log.alarm(f"{checkpoint.name} is not copied: {why}", step=step, about=ABOUT)
