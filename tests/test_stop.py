"""Runs that are asked to stop, and runs in which a process dies: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nmm.stop import EXIT_CODE
from tests import runs
from tests.launches import (
    check_same_logs,
    descendants,
    last_step,
    pid_of_rank,
    started,
    wait_until,
)
from tests.runs import command, overrides, run

FAULTS = """
import sys, os, signal, time
from pathlib import Path
from nmm import fault, parallel, stop
from nmm.errors import UserError
world = parallel.start()
stop.listen(Path("."), max_minutes=None, world=world)
with fault.ending_together(world, Path(__file__).parent, where=lambda: "after step 7"):
    if world.rank == 1 and sys.argv[1] == "refused":
        raise UserError("data.x is 1; set it to 2.")
    if world.rank == 1 and sys.argv[1] == "bug":
        raise KeyError("a bug")
    if world.rank == 1 and sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    parallel.barrier()
"""


def ended(directory: Path) -> list[tuple[str, int]]:
    """(how, after which step) of every start of a run."""
    starts = json.loads((directory / "manifest.json").read_text())["starts"]
    return [(end["how"], end["step"]) for start in starts if (end := start.get("ended"))]


def test_a_run_stops_when_asked_and_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """By clock, signal and file, before a step and in evaluations."""
    whole, directory, log = runs.undisturbed(), tmp_path / "asked", tmp_path / "log"
    arguments = command(runs.corpus(), tmp_path, "run.name=asked", "log.wandb=off")
    done = run([*arguments, "run.max_minutes=0.02"])
    assert (done.returncode, "max_minutes=0.02 passed" in done.stdout) == (EXIT_CODE, True)

    with started(arguments, log=log) as process:
        for step in (100, 200):  # the first evaluation that can be caught before its end
            wait_until(lambda due=step: last_step(directory) >= due, seconds=60, log=log)
            process.send_signal(signal.SIGSTOP)
            caught = last_step(directory) == step != last_step(directory, log="evals")
            if caught:
                process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGCONT)
            if caught:
                break
        assert process.wait(30) == EXIT_CODE, log.read_text()
    assert last_step(directory, log="evals") < last_step(directory) == step
    assert "SIGUSR1 was received" in log.read_text()

    (directory / "STOP").write_text("maintenance")
    done = run(arguments)  # the file is seen in the evaluation that is owed
    assert done.returncode == EXIT_CODE, done.stdout + done.stderr
    assert f"after step {step} of 300, because {directory / 'STOP'} is there" in done.stdout
    assert "(maintenance); the same command continues it" in done.stdout

    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    check_same_logs(directory, whole)
    hows, steps = zip(*ended(directory), strict=True)
    assert hows == ("stopped", "stopped", "stopped", "finished")
    assert steps[1:] == (step, step, 300)


def test_two_processes_stop_together_and_start_again_together(tmp_path: Path) -> None:
    """Asked by a scheduler, then through torchrun, whose SIGKILL comes 30 s after SIGTERM.

    In the end one process is killed: it is named, and the restart finishes the run.
    """
    directory, log = tmp_path / "two", tmp_path / "log"
    words = overrides(runs.corpus(), tmp_path, "run.name=two", *runs.TWO)
    ours = [sys.executable, "-m", "launch.torchrun", "--processes", "2", "--restarts", "1", "--"]
    theirs = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    with started([*ours, *words, "log.wandb=offline"], log=log) as launcher:
        wait_until(lambda: last_step(directory) > 5, seconds=60, log=log)
        # As schedulers do: to every process, wandb's and those that load data among them.
        for pid in [launcher.pid, *descendants(launcher.pid)]:
            os.kill(pid, signal.SIGTERM)
        assert launcher.wait(30) == EXIT_CODE, log.read_text()
    assert log.read_text().count("\n") < 10, log.read_text()  # no pages of torchrun's or wandb's

    with started([*theirs, *words], log=tmp_path / "pages") as launcher:
        resumed_at = ended(directory)[0][1]
        wait_until(lambda: last_step(directory) > resumed_at + 5, seconds=60, log=log)
        asked_at = time.monotonic()
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) != 0
    assert time.monotonic() - asked_at < 25
    assert [how for how, _ in ended(directory)] == ["stopped", "stopped"]

    with started([*ours, *words], log=log) as launcher:
        resumed_at = ended(directory)[1][1]
        wait_until(lambda: last_step(directory) > resumed_at + 5, seconds=60, log=log)
        os.kill(killed := pid_of_rank(launcher.pid, 0), signal.SIGKILL)
        assert launcher.wait(100) == 0, log.read_text()
    (lost,) = map(json.loads, (directory / "faults.jsonl").read_text().splitlines())
    assert (lost["rank"], lost["pid"]) == (0, killed)
    assert "error: process 0 of 2 no longer answers after step" in log.read_text()
    assert f"; it was in step {lost['step']}, {lost['phase']}" in log.read_text()
    assert "Traceback" not in log.read_text()
    check_same_logs(directory, runs.two_undisturbed())


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("refused", "error: data.x is 1; set it to 2."),
        ("killed", "error: process 1 of 2 no longer answers after step 7 (on "),
        ("bug", "KeyError: 'a bug'"),
    ],
)
def test_only_one_process_tells_why_a_run_fails(tmp_path: Path, case: str, said: str) -> None:
    script = tmp_path / "fault.py"
    script.write_text(FAULTS)
    environment = runs.environment() | {"PYTHONPATH": str(Path.cwd())}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), case], env=environment, capture_output=True, text=True
    )
    ours = done.stderr.partition("multiprocessing/api.py:1002] failed")[0].splitlines()
    told = [line for line in ours if "error: " in line.lower()]
    assert done.returncode != 0
    assert [said in line for line in told] == [True], done.stderr
    assert sum("Traceback" in line for line in ours) == (1 if case == "bug" else 0), done.stderr
