"""Processes that die or hang: real ones, real signals; what they were doing is said and true."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import pytest

from data.loader import Loader
from nmm import heartbeat
from nmm.config import compose, load
from nmm.elastic import Failure
from nmm.heartbeat import Heartbeat, Phase, Place
from tests import corpora, runs
from tests.launches import last_step, started, wait_until
from tests.runs import overrides

BEATING = """
import sys
from pathlib import Path
from nmm.heartbeat import Heartbeat, Phase
heart, step = Heartbeat(Path(sys.argv[1]), rank=0), 0
while True:
    step += 1
    heart.enter(Phase.data, step=step)
    heart.hold([[f"{step}/{number}" for number in range(step % 3000)], [f"{step}/last"]])
    for phase in (Phase.forward, Phase.backward):
        for micro_batch in (0, 1):
            heart.enter(phase, micro_batch)
    heart.enter(Phase.optimizer)
"""


def step_of(directory: Path) -> int:
    """The step that the writer has come to."""
    place = heartbeat.read(directory, 0)
    return place.step if place else 0


def expected_documents(place: Place) -> list[list[str]]:
    """What BEATING may have said of its micro-batches."""
    step = place.step
    both = [[f"{step}/{number}" for number in range(step % 3000)], [f"{step}/last"]]
    return [[], both[0], both[1], [*both[0], *both[1]]]


def test_a_place_is_true_whenever_it_is_read_and_whenever_the_writer_is_killed(
    tmp_path: Path,
) -> None:
    seen: set[str] = set()

    def is_true(writer: subprocess.Popen, directory: Path, *, last: bool) -> None:
        place = heartbeat.read(directory, 0)
        assert place is not None
        assert (place.pid, place.host) == (writer.pid, socket.gethostname())
        # One may read the place, and the documents after those of the next step were written.
        allowed = expected_documents(place)
        found = [one for one in allowed if one[: len(place.documents)] == place.documents]
        assert found, place
        if last and place.phase != "data wait":
            assert place.num_documents in [len(one) for one in found if one]
        seen.add(place.phase)

    for number in range(4):
        directory, log = tmp_path / f"{number}", tmp_path / "log"
        with started([sys.executable, "-c", BEATING, str(directory)], log=log) as writer:
            wait_until(lambda of=directory: step_of(of) > 1, seconds=100, log=log)
            deadline = time.monotonic() + 100
            for reads in count():
                if reads > 300 and len(seen) > 1:  # it was read in the middle of steps
                    break
                is_true(writer, directory, last=False)
                assert time.monotonic() < deadline, seen
            writer.kill()
            writer.wait()
            is_true(writer, directory, last=True)


def test_a_place_names_the_documents_of_its_micro_batch(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, rank=3)
    assert heartbeat.read(tmp_path, 2) is None
    heart.enter(Phase.data, step=8)
    heart.hold([["a", "b"], [f"{number:09d}" for number in range(9000)]])
    told = {}
    for phase, micro_batch in ((Phase.data, 0), (Phase.forward, 0), (Phase.backward, 1)):
        heart.enter(phase, micro_batch)
        place = heartbeat.read(tmp_path, 3)
        assert place is not None
        told[phase] = place.sentence()
    assert told[Phase.data] == "in step 8, data wait"
    assert told[Phase.forward] == "in step 8, forward, with 2 documents: a, b"
    five = ", ".join(f"{number:09d}" for number in range(5))
    assert told[Phase.backward] == f"in step 8, backward, with 9000 documents: {five}, ..."
    heart.enter(Phase.start, step=9)  # the documents are of the step before
    assert getattr(heartbeat.read(tmp_path, 3), "num_documents", None) == 0
    heart.close()


SHORT = ("schedule.total_steps=5000", "checkpoint.every_steps=9999", "evaluation.at_start=false")
QUICK = (*SHORT, "run.name=trained", "log.wandb=off", "run.timeout_minutes=0.1", "data.workers=0")


def of_the_plan(words: list[str], *, step: int, rank: int) -> list[str]:
    """The documents of a process of two in a step."""
    settings = load(compose(words))
    corpus = corpora.open_corpus(settings.data)
    loader = Loader(corpus, settings.data, rank=rank, world=2, micro_batch=4, workers=0)
    batches, _ = next(islice(loader, step - 1, None))
    return [key for batch in batches for key in batch.flat_keys]


def check_told(said: str, directory: Path, words: list[str], *, start: str) -> None:
    """The sentence tells the place that the file has, and its documents are those of the plan."""
    place = heartbeat.read(directory, 1)
    assert place is not None
    assert said.count("error: ") == 1, said
    assert start in said
    assert f"; it was {place.sentence()}; look there for the cause" in said
    (row,) = map(json.loads, (directory / "faults.jsonl").read_text().splitlines())
    assert {key: row[key] for key in vars(place)} == vars(place)
    if place.documents:
        assert place.documents == of_the_plan(words, step=place.step, rank=1)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases of tests/failing_cases.py have ended."""
    directory = tmp_path_factory.mktemp("failed")
    words, log = overrides(runs.corpus(), directory, *QUICK), directory / "log"
    (directory / "words.json").write_text(json.dumps(words))
    run = directory / "trained"
    with started([sys.executable, "-m", "tests.failing_cases", str(directory)], log=log) as cases:
        wait_until(lambda: last_step(run) > 5 or cases.poll() is not None, seconds=100, log=log)
        place = heartbeat.read(run, 1)
        assert place is not None, log.read_text()
        os.kill(place.pid, signal.SIGSTOP)
        assert cases.wait(100) == 0, log.read_text()
    return directory


def test_a_process_that_hangs_is_named_with_its_documents(failed: Path) -> None:
    """It stands still in the middle of a run."""
    words = json.loads((failed / "words.json").read_text())
    start = f"process 1 of 2 no longer answers after step {last_step(failed / 'trained')} (on "
    check_told((failed / "trained.log").read_text(), failed / "trained", words, start=start)
    assert codes(failed, "trained") == [1]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("alone", "process 0 of 1 does not go on after step 7 (on HOST): SLOW backward, with 1 "),
        ("behind", "process 1 of 2 does not go on after step 7 (on HOST): SLOW data wait; GONE"),
        ("slow", "process 1 of 2 does not go on after step 7 (on HOST): SLOW data wait; GONE"),
        (
            "stopped",
            "process 1 of 2 no longer answers after step 7 (on HOST): SLOW data wait; GONE",
        ),
        ("late", "all 2 processes answer after step 7, but one came too late ("),
    ],
)
def test_processes_that_wait_for_ever_end_themselves(failed: Path, case: str, told: str) -> None:
    """See `wait` of tests/failing_cases.py."""
    said, expected = (failed / f"{case}.log").read_text(), told
    for word, text in {
        "HOST": socket.gethostname(),
        "SLOW": "no phase ended for 3 seconds; it was in step 8,",
        "GONE": "look there for the cause; the same command continues from the last checkpoint.",
    }.items():
        expected = expected.replace(word, text)
    assert said.startswith(f"error: {expected}"), said
    assert said.count("\n") == 1, said
    assert codes(failed, case) == [1] * (1 if case in ("alone", "stopped") else 2)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("refused", "error: data.x is 1; set it to 2."),
        ("killed", "error: process 1 of 2 no longer answers after step 7 (on "),
        ("bug", "KeyError: 'a bug'"),
    ],
)
def test_only_one_process_tells_why_a_run_fails(failed: Path, case: str, said: str) -> None:
    lines = (failed / f"{case}.log").read_text().splitlines()
    told = [line for line in lines if "error: " in line.lower()]
    assert [said in line for line in told] == [True], lines
    assert sum("Traceback" in line for line in lines) == (1 if case == "bug" else 0), lines
    assert codes(failed, case) == [1, -signal.SIGKILL if case == "killed" else 1]


def codes(directory: Path, case: str) -> list[int]:
    """What its processes ended with."""
    return json.loads((directory / "codes.json").read_text())[case]


def test_the_launcher_says_what_a_killed_process_was_doing(tmp_path: Path) -> None:
    """With NCCL the others hang until torchrun kills them, and say nothing."""
    heart = Heartbeat(tmp_path, rank=1)
    heart.enter(Phase.checkpoint, step=8)
    said = "process 1 was killed by SIGKILL"
    assert Failure(said, rank=1, pid=os.getpid()).told(tmp_path) == f"{said} in step 8, checkpoint"
    assert Failure(said, rank=1, pid=1).told(tmp_path) == said  # the file is of another start
    assert Failure(said, rank=0, pid=1).told(tmp_path) == said
    assert Failure("a failure").told(tmp_path) == "a failure"
    heart.close()
