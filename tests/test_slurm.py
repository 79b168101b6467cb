"""Jobs on a real Slurm of two nodes: preempted, requeued, resumed, in order, many at once."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import slurm
from launch.study.__main__ import main as launch_study
from launch.study.state import Folder, State, standings_of
from tests import runs, slurm_cluster
from tests.launches import check_same_logs, last_step, standing_still, wait_until
from tests.runs import overrides, run
from tests.slurm_cluster import Cluster
from tests.test_study import planned, plant, study_file
from tests.train_cases import two_undisturbed

WHY_NOT = slurm_cluster.missing()
HIGH = ("--parsable", "--partition=high", "--nodes=2")
ON_TWO_NODES = ("--nodes=2", "--gpus-per-node=0", "--partition=low", "--time=10:00")
LONG = ("schedule.total_steps=5000", "log.wandb=off", "data.workers=0")
SHORT = ("schedule.total_steps=3", "schedule.warmup_steps=1", "log.wandb=off", "data.workers=0")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with slurm_cluster.cluster() as there:
        yield there


def submit(cluster: Cluster, *words: str) -> str:
    """The number of the job."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.slurm", *words],
        env=runs.environment() | cluster.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(";")[0].removeprefix("submitted job ")


def starts(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "manifest.json").read_text())["starts"]


def stops(directory: Path) -> list[str]:
    return [start["ended"]["how"] for start in starts(directory) if "ended" in start]


@pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")
def test_jobs_stop_for_others_go_back_into_the_queue_and_finish_or_stay_away(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, log = tmp_path / "two", tmp_path / "slurm"
    words = overrides(runs.corpus(), tmp_path, "run.name=two", *runs.TWO)
    job = submit(cluster, *ON_TWO_NODES, "--requeue", "--", *words)
    array = ["--array=1-2", f"--after={job}", "--nodes=1", "--gpus-per-node=0", "--time=10:00"]
    each = overrides(runs.corpus(), tmp_path, "run.name=seed_{task}", "run.seed={task}", *SHORT)
    later = submit(cluster, *array, "--", *each)
    printed = log / f"two-{job}.out"

    wait_until(lambda: last_step(directory) > 3, seconds=100, log=printed)
    assert cluster.state(f"{later}_1")["JobState"] == "PENDING"
    with standing_still(directory):
        # As Slurm does it before a time limit: a signal to the shell of the job alone.
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
        wait_until((directory / "STOP").exists, seconds=100, log=printed)
    report = study_of_two(cluster, tmp_path, monkeypatch, capsys)
    cancel(cluster, tmp_path)  # meanwhile, because Slurm makes the first one wait
    wait_until(lambda: len(starts(directory)) == 2, seconds=100, log=printed)
    assert "because" in printed.read_text()
    assert f"(the time limit of job {job})" in printed.read_text()

    resumed_at = starts(directory)[1]["step"]
    wait_until(lambda: last_step(directory) > resumed_at + 3, seconds=100, log=printed)
    first = tmp_path / "first.sh"
    first.write_text("#!/bin/sh\ntrue\n")
    with standing_still(directory):
        other = cluster.ask("sbatch", f"--output={tmp_path}/first.out", *HIGH, str(first))
        # Slurm lets the processes go on when it asks them to end.
        wait_until(lambda: stops(directory) == ["stopped", "stopped"], seconds=100, log=printed)
    wait_until(lambda: len(starts(directory)) == 3, seconds=100, log=printed)
    cluster.wait_for(other.strip(), "COMPLETED", seconds=100)
    cluster.wait_for(job, "COMPLETED", seconds=100)
    assert stops(directory) == ["stopped", "stopped", "finished"]
    check_same_logs(directory, two_undisturbed())
    for task in (1, 2):
        cluster.wait_for(f"{later}_{task}", "COMPLETED", seconds=100)
        assert last_step(tmp_path / f"seed_{task}") == 3
    cluster.wait_for(report, "COMPLETED", seconds=100)
    check_study(tmp_path)


def study_of_two(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Submit a trunk and its branch, twice, and return the number of the report's job.

    Five more points of the law are there already, so that the report has enough of them.
    """
    words = study_words(tmp_path)
    for one in planned(*words)[1]:
        if one.cell.size == "w16" and one.is_point:
            plant(one, runs=tmp_path / "runs", loss=2 + 40 / one.tokens**0.25)
    with monkeypatch.context() as patched:
        for name, value in (runs.environment() | cluster.environment).items():
            patched.setenv(name, value)
        for _ in range(2):
            with pytest.raises(SystemExit, match=r"^0$"):
                launch_study([*words, "submit=slurm"])
    said = capsys.readouterr().out
    found = re.findall(r"submitted job (\d+): (.+);", said)
    assert [name for _, name in found] == [
        "ours-early-w32-trunk4",
        "ours-early-w32-16p384k",
        "the report of ours",
    ]
    assert "nothing to submit: every run is done, failed or in the queue" in said
    return found[-1][0]


def study_words(tmp_path: Path) -> list[str]:
    own = ("run.dir", "schedule.", "evaluation.every", "evaluation.at", "model.width")
    words = [w for w in overrides(runs.corpus(), tmp_path) if not w.startswith(own)]
    more = ["log.wandb=off", "data.workers=0", "schedule.warmup_steps=4"]
    sizes = {
        "w16": {
            "overrides": ["model.width=16"],
            "token_budgets": [steps * 1024 for steps in (48, 64, 80, 96, 112)],
        },
        "w32": {"overrides": ["model.width=32"]},
    }
    return study_file(
        tmp_path,
        overrides=words + more,
        token_budgets=[16 * 1024],
        families={"early": {"sizes": sizes}},
        bootstrap=0,
        slurm={"gpus_per_node": 0, "time": "10:00", "report_time": "10:00"},
    )


def check_study(tmp_path: Path) -> None:
    study, planned_runs = planned(*study_words(tmp_path))
    folder = Folder(tmp_path / "runs", study.name)
    found = standings_of(planned_runs, folder, retries=0)
    assert {one.state for one in found.values()} == {State.finished}
    branch = tmp_path / "runs" / "ours-early-w32-16p384k"
    assert [start["step"] for start in starts(branch)] == [14]
    table = csv.DictReader((folder.notes / "runs.csv").read_text().splitlines())
    assert next(row["tokens"] for row in table if row["run"] == branch.name)
    assert json.loads((folder.notes / "fits" / "early" / "fit.json").read_text())["points"] == 6
    assert (folder.notes / "report" / "report.html").stat().st_size > 0


def cancel(cluster: Cluster, tmp_path: Path) -> None:
    """A cancelled job leaves a checkpoint and stays away."""
    directory = tmp_path / "gone"
    words = overrides(runs.corpus(), tmp_path, "run.name=gone", *LONG)
    alone = ("--nodes=1", "--gpus-per-node=0", "--time=10:00", "--requeue")
    job = submit(cluster, *alone, "--", *words)
    printed = tmp_path / "slurm" / f"gone-{job}.out"
    wait_until(lambda: last_step(directory) > 3, seconds=100, log=printed)
    cluster.ask("scancel", job)
    cluster.wait_for(job, "CANCELLED", seconds=100)
    assert stops(directory) == ["stopped"]
    newest = max((directory / "checkpoints").glob("step_*/COMPLETE")).parent.name
    assert newest == f"step_{last_step(directory):08d}"
    assert cluster.state(job)["Restarts"] == "0"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--array=0-3", "--", "run.name=x"], "--array is 0-3 and {task} is not among"),
        (["--", "run.name=x_{task}"], "--array is None and {task} is among the overrides"),
        (["--time=5:00", "--", "run.name=x"], "--stop-seconds is 300, so the run would be asked"),
        (["--time=5 hours", "--", "run.name=x"], "--time is 5 hours; give it like 24:00:00 or"),
        (["--", "model.widht=3"], "Key 'widht' not in 'ModelConfig'"),
        (["--", "run.name=x"], "sbatch is not there; log in to a machine of the cluster"),
    ],
)
def test_what_cannot_start_is_not_submitted(tmp_path: Path, words: list[str], said: str) -> None:
    words = [*words, "schedule.total_steps=5", f"run.dir={tmp_path}"]
    program = [sys.executable, "-m", "launch.slurm", "--gpus-per-node=8", "--time=1:00:00"]
    done = subprocess.run(
        [*program, *words], env=os.environ | {"PATH": ""}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr


def test_the_script_is_bash_and_keeps_every_word(tmp_path: Path) -> None:
    """Words that the shell would change come back as they were; {task} is the task's number."""
    awkward = ["data.tokenizer='a b $HOME \"c\".model'", "run.name=r_{task}_x", "run.seed={task}"]
    more = ["schedule.total_steps=5", f"run.dir={tmp_path}"]
    program = [sys.executable, "-m", "launch.slurm", "--gpus-per-node=8", "--time=1:00:00"]
    given = ["--array=0-3%2", "--dry-run", "--sbatch=--qos=long", "--", *awkward, *more]
    done = run([*program, *given])
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --qos=long\n" in done.stdout
    srun = done.stdout[done.stdout.index("-- 'data.tokenizer") :].partition("&\nstep")[0]
    shown = subprocess.run(
        ["bash", "-uc", f"printf '%s\\n' {srun}"],
        env={"SLURM_ARRAY_TASK_ID": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [word.replace("{task}", "2") for word in (*awkward, *more)]
    assert shown.stdout.splitlines() == ["--", *expected]
    syntax = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert (syntax.returncode, syntax.stderr) == (0, "")


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86_400),
        ("2-12", 216_000),
        ("2-12:30", 217_800),
        ("2-12:30:10", 217_810),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, expected: int) -> None:
    assert slurm.seconds(time) == expected
