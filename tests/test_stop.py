"""Runs that are asked to stop, and runs in which a process dies: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from nmm.stop import EXIT_CODE
from tests import runs
from tests.launches import (
    check_same_logs,
    descendants,
    last_step,
    standing_still,
    started,
    wait_until,
)
from tests.runs import overrides
from tests.train_cases import launch, two_undisturbed

# One process imports everything and is copied for every line of its input: the overrides of a run,
# and the step whose evaluation sends it a signal. It answers with the exit code.
ASKED = """
import os, signal, sys, train
from nmm.config import compose, load
from nmm.heartbeat import Heartbeat, Phase

enter = Heartbeat.enter

def train_it(words, *, signalled_at):
    def signal_in(heartbeat, phase, *more, **named):
        enter(heartbeat, phase, *more, **named)
        if phase is Phase.evaluation and heartbeat.step == signalled_at:
            os.kill(os.getpid(), signal.SIGUSR1)

    Heartbeat.enter = signal_in
    log = os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train.run(load(compose(words)), overrides=words)
    sys.stdout.flush()
    os._exit(0)

for line in sys.stdin:
    if os.fork() == 0:
        step, *words = line.split()
        train_it(words, signalled_at=int(step))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def ended(directory: Path) -> list[tuple[str, int]]:
    """(how, after which step) of every start of a run."""
    starts = json.loads((directory / "manifest.json").read_text())["starts"]
    return [(end["how"], end["step"]) for start in starts if (end := start.get("ended"))]


def test_a_run_stops_when_asked_and_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """By clock, signal and file, before a step and in evaluations."""
    whole, directory, log = runs.undisturbed(), tmp_path / "asked", tmp_path / "log"
    words = overrides(runs.corpus(), tmp_path, "run.name=asked", "log.wandb=off")
    with subprocess.Popen(
        [sys.executable, "-c", ASKED, str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=runs.environment() | {"PYTHONPATH": str(Path.cwd())},
    ) as process:
        assert process.stdin
        assert process.stdout

        def train(*more: str, signalled_at: int = -1) -> tuple[int, str]:
            """Its exit code, and what it said."""
            assert process.stdin
            assert process.stdout
            before = len(log.read_text()) if log.exists() else 0
            print(signalled_at, *words, *more, file=process.stdin, flush=True)
            return int(process.stdout.readline()), log.read_text()[before:]

        code, said = train("run.max_minutes=0.02")
        assert (code, "max_minutes=0.02 passed" in said) == (EXIT_CODE, True), said

        code, said = train(signalled_at=100)
        assert (code, "SIGUSR1 was received" in said) == (EXIT_CODE, True), said
        assert (last_step(directory), last_step(directory, log="evals")) == (100, 0)

        (directory / "STOP").write_text("maintenance")
        code, said = train()  # the file is seen in the evaluation that is owed
        assert code == EXIT_CODE, said
        assert f"after step 100 of 300, because {directory / 'STOP'} is there" in said
        assert "(maintenance); the same command continues it" in said

        code, said = train()
        assert code == 0, said
        process.stdin.close()
    check_same_logs(directory, whole)
    hows, steps = zip(*ended(directory), strict=True)
    assert hows == ("stopped", "stopped", "stopped", "finished")
    assert steps[1:] == (100, 100, 300)


def test_two_processes_stop_together_and_start_again_together(tmp_path: Path) -> None:
    """Asked by a scheduler, then through torchrun, whose SIGKILL comes 30 s after SIGTERM."""
    directory, log = tmp_path / "two", tmp_path / "log"
    words = overrides(runs.corpus(), tmp_path, "run.name=two", *runs.TWO)
    ours = [sys.executable, "-m", "launch.torchrun", "--processes", "2", "--restarts", "1", "--"]
    theirs = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    with started([*ours, *words, "log.wandb=offline"], log=log) as launcher:
        wait_until(lambda: last_step(directory) > 5, seconds=100, log=log)
        with standing_still(directory):
            # As schedulers do: to every process, wandb's and those that load data among them.
            for pid in [launcher.pid, *descendants(launcher.pid)]:
                with suppress(ProcessLookupError):  # one that has just done its work
                    os.kill(pid, signal.SIGTERM)
        assert launcher.wait(100) == EXIT_CODE, log.read_text()
    assert log.read_text().count("\n") < 10, log.read_text()  # no pages of torchrun's or wandb's

    with started([*theirs, *words], log=tmp_path / "pages") as launcher:
        resumed_at = ended(directory)[0][1]
        wait_until(lambda: last_step(directory) > resumed_at + 5, seconds=100, log=log)
        with standing_still(directory):
            launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(100) != 0
    # Not killed: who is has no time to note how it ended.
    assert [how for how, _ in ended(directory)] == ["stopped", "stopped"]

    launch([words], directory=tmp_path, processes=2)
    assert [how for how, _ in ended(directory)] == ["stopped", "stopped", "finished"]
    check_same_logs(directory, two_undisturbed())
