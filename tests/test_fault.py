"""Processes that die or hang: real ones, real signals; what they were doing is said and true."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

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


def expected_documents(place: Place) -> list[list[str]]:
    """What BEATING may have said of its micro-batches."""
    step = place.step
    both = [[f"{step}/{number}" for number in range(step % 3000)], [f"{step}/last"]]
    return [[], both[0], both[1], [*both[0], *both[1]]]


def test_a_place_is_true_whenever_it_is_read_and_whenever_the_writer_is_killed(
    tmp_path: Path,
) -> None:
    seen = set()
    for number in range(4):
        directory = tmp_path / f"{number}"
        writer = subprocess.Popen([sys.executable, "-c", BEATING, str(directory)])
        while not (place := heartbeat.read(directory, 0)) or place.step < 2:
            time.sleep(0.01)
        for last in [False] * 300 + [True]:
            if last:
                writer.kill()
                writer.wait()
            place = heartbeat.read(directory, 0)
            assert place is not None
            assert (place.pid, place.host) == (writer.pid, socket.gethostname())
            # One may read the place, and the documents after those of the next step were written.
            allowed = expected_documents(place)
            found = [one for one in allowed if one[: len(place.documents)] == place.documents]
            assert found, (place, number)
            if last and place.phase != "data wait":
                assert place.num_documents in [len(one) for one in found if one]
            seen.add(place.phase)
    assert len(seen) > 1  # it was read in the middle of steps


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
QUICK = (*SHORT, "run.name=fault", "log.wandb=off", "run.timeout_minutes=0.05")


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


@contextmanager
def two(program: list[str], *, log: Path) -> Iterator[list[subprocess.Popen]]:
    """The same program as two processes that know of each other, without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "PYTHONPATH": str(Path.cwd()),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(program, log=log, env={**common, "RANK": rank, "LOCAL_RANK": rank})
            )
            for rank in ("0", "1")
        ]


def test_a_process_that_hangs_is_named_with_its_documents(tmp_path: Path) -> None:
    words = overrides(runs.corpus(), tmp_path, *QUICK, "data.workers=0")
    directory, log = tmp_path / "fault", tmp_path / "log"
    with two([sys.executable, "train.py", *words], log=log) as both:
        wait_until(lambda: last_step(directory) > 5, seconds=100, log=log)
        both[1].send_signal(signal.SIGSTOP)
        assert both[0].wait(30) == 1, log.read_text()
    start = f"process 1 of 2 no longer answers after step {last_step(directory)} (on "
    check_told(log.read_text(), directory, words, start=start)


HANGING = """
import os, signal, sys, time
from pathlib import Path
from nmm import fault, parallel
from nmm.heartbeat import Phase
case, directory = sys.argv[1], Path(sys.argv[2])
world = parallel.start(timeout_minutes=0.05)
where = lambda: "after step 7"
with (
    fault.ending_together(world, directory, where=where),
    fault.watched(directory, timeout_minutes=0.05, world=world, where=where) as heart,
):
    heart.enter(Phase.data, step=8)
    if world.rank == 1 and case == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if world.rank == 1 and case == "late":
        time.sleep(4)
    if world.rank == 1 and case == "slow":
        fault._is_first = lambda world: time.sleep(2) or world.store.add("nmm/fault", 1) == 1
    if world.rank == 0:
        heart.hold([["a"], ["b"]])
        heart.enter(Phase.backward, 1)
    if case == "late":
        heart.enter(Phase.optimizer)
        parallel.barrier()
    time.sleep(60)
"""


def test_processes_that_wait_for_ever_end_themselves(tmp_path: Path) -> None:
    """As in a collective of NCCL, which never comes back, or on a disk that is gone."""
    (tmp_path / "hang.py").write_text(HANGING)
    slow = "no phase ended for 3 seconds; it was in step 8,"
    gone = "look there for the cause; the same command continues from the last checkpoint.\n"
    cases = {
        "alone": f"process 0 of 1 does not go on after step 7 (on HOST): {slow} backward, with 1 "
        f"document: b; {gone}",
        "behind": f"process 1 of 2 does not go on after step 7 (on HOST): {slow} data wait; {gone}",
        "slow": f"process 1 of 2 does not go on after step 7 (on HOST): {slow} data wait; {gone}",
        "stopped": f"process 1 of 2 no longer answers after step 7 (on HOST): {slow} data wait; "
        + gone,
        "late": "all 2 processes answer after step 7, but one came too late (",
    }
    with ExitStack() as stack:
        running = {}
        for case in cases:
            directory, log = tmp_path / case, tmp_path / f"{case}.log"
            program = [sys.executable, str(tmp_path / "hang.py"), case, str(directory)]
            alone = started(program, log=log, env={"PYTHONPATH": str(Path.cwd())})
            running[case] = (
                [stack.enter_context(alone)]
                if case == "alone"
                else stack.enter_context(two(program, log=log))
            )
        for case, processes in running.items():
            waited = processes[:1] if case == "stopped" else processes
            said = tmp_path / f"{case}.log"
            assert [process.wait(60) for process in waited] == [1] * len(waited), said.read_text()
    for case, expected in cases.items():
        said = (tmp_path / f"{case}.log").read_text()
        assert said.startswith("error: " + expected.replace("HOST", socket.gethostname())), said
        assert said.count("\n") == 1, said


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
