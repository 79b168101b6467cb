"""Start runs as processes of their own sessions, which outlive the launcher.

On a machine without GPUs a run of one process is a fork of the launcher, which has imported torch
once: most of the time of a short run. The driver of GPUs does not survive a fork.
"""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Protocol

from launch.torchrun import ENVIRONMENT, ROOT

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # of which the launcher knows
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class Process(Protocol):
    """What the launcher keeps of a run that it started."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        ...


class Fork:
    """A child made by os.fork, in the words of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid, self._code = pid, None

    def poll(self) -> int | None:
        if self._code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code


def start(words: Sequence[str], *, processes: int, output: Path) -> Process:
    """train.py with these overrides; what it prints is added to `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if processes == 1 and not glob("/dev/nvidia[0-9]*"):
        return _fork(words, output=output)
    with output.open("ab") as file:
        return subprocess.Popen(
            program(words, processes=processes),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ},
            start_new_session=True,
        )


def program(words: Sequence[str], *, processes: int) -> list[str]:
    """The command of a run; one process needs no launcher."""
    if processes == 1:
        return [sys.executable, str(ROOT / "train.py"), *words]
    launcher = [sys.executable, "-m", "launch.torchrun", "--processes", str(processes), "--"]
    return [*launcher, *words]


def _fork(words: Sequence[str], *, output: Path) -> Fork:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import train  # noqa: F401 - for the children

    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Fork(pid)
    try:
        _become(words, output=output)
    finally:
        os._exit(1)  # never back into the launcher's own code


def _become(words: Sequence[str], *, output: Path) -> None:
    """Run train.py as a shell would, to its end."""
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(output, APPEND, 0o666)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    code: object = 1
    sys.argv = ["train.py", *words]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:  # whatever it is: a forked process must not go on in its parent's code
        traceback.print_exc()
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
