"""Two machines in network namespaces: one is cut off in the middle of a run and comes back."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import runs
from tests.launches import check_same_logs, last_step, standing_still, started, wait_until
from tests.runs import overrides
from tests.train_cases import two_undisturbed


def missing() -> str | None:
    """Why there can be no namespaces here; tried, because containers often forbid them."""
    if not shutil.which("ip"):
        return "ip is not installed (iproute2)"
    done = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return None if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()}"


WHY_NOT = missing()


def ip(*words: str, netns: str | None = None) -> None:
    inside = ["-netns", netns] if netns else []
    subprocess.run(["ip", *inside, *words], check=True)


@contextmanager
def two_machines() -> Iterator[list[str]]:
    """The namespaces of two machines on one cable, with addresses 10.77.0.1 and 10.77.0.2."""
    names = [f"nmm-{os.getpid()}-{number}" for number in (1, 2)]
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ends = [word for name in names for word in ("eth0", "netns", name)]
        ip("link", "add", *ends[:3], "type", "veth", "peer", *ends[3:])
        for number, name in enumerate(names, 1):
            ip("address", "add", f"10.77.0.{number}/24", "dev", "eth0", netns=name)
            for device in ("eth0", "lo"):
                ip("link", "set", device, "up", netns=name)
        yield names


def inside(namespace: str, number: int) -> list[str]:
    """What starts a command there, on a machine with a name of its own."""
    named = ["sh", "-c", 'hostname "$0" && exec "$@"', f"machine-{number}"]
    return ["ip", "netns", "exec", namespace, "unshare", "--uts", *named]


@pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")
def test_a_machine_that_is_cut_off_is_named_and_the_run_resumes(tmp_path: Path) -> None:
    directory = tmp_path / "two"
    words = overrides(runs.corpus(), tmp_path, "run.name=two", *runs.TWO)
    meeting = ["--processes=1", "--nodes=2", "--rendezvous=10.77.0.1:29500"]
    program = [sys.executable, "-m", "launch.torchrun", *meeting, "--", *words]
    logs = [tmp_path / f"log-{number}" for number in (1, 2)]
    with two_machines() as names:

        @contextmanager
        def both(*more: str) -> Iterator[list[subprocess.Popen]]:
            """The same command on both, each with a name that the other cannot resolve."""
            with ExitStack() as stack:
                yield [
                    stack.enter_context(started([*inside(name, number), *program, *more], log=log))
                    for name, number, log in zip(names, (1, 2), logs, strict=True)
                ]

        with both("run.timeout_minutes=0.2") as launchers:
            wait_until(lambda: last_step(directory) > 7, seconds=100, log=logs[0])
            with standing_still(directory):
                ip("link", "set", "eth0", "down", netns=names[1])
            assert launchers[0].wait(100) == 1, logs[0].read_text()
            said = logs[0].read_text()
            named = f"error: process 1 of 2 no longer answers after step {last_step(directory)} "
            assert f"{named}(on machine-2): Timed out waiting 12000ms" in said
            assert "Traceback" not in said
            ip("link", "set", "eth0", "up", netns=names[1])
            assert launchers[1].wait(100) == 1, logs[1].read_text()
            assert "process 0 of 2 no longer answers" in logs[1].read_text()
        with both() as launchers:
            assert [launcher.wait(100) for launcher in launchers] == [0, 0], logs[0].read_text()
        assert "continuing" in logs[0].read_text()
    check_same_logs(directory, two_undisturbed())
