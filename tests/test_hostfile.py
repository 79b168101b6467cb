"""The deepspeed launcher with a hostfile: over ssh, and by the same command on each machine."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import runs
from tests.launches import check_same_logs, last_step, standing_still, started, wait_until
from tests.ports import free_port
from tests.runs import overrides
from tests.train_cases import two_undisturbed

ABSENT = [
    name
    for name in ("sshd", "ssh", "pdsh")
    if not shutil.which(name, path="/usr/sbin:/usr/bin:/bin")
]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


@contextmanager
def ssh_server(folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A server for this user alone: its port, and the environment in which pdsh finds the key."""
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    port = free_port()
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    words = [f"-o{key}={value}" for key, value in options.items()]
    client = f"-i {folder / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    # The shell at the other end knows nothing of this process's environment.
    (folder / "environment").write_text("OMP_NUM_THREADS=1\nOMP_WAIT_POLICY=passive\n")
    environment = {
        "PDSH_SSH_ARGS_APPEND": f"{client} -o LogLevel=ERROR",
        "DS_ENV_FILE": str(folder / "environment"),
    }
    with started(["/usr/sbin/sshd", "-D", "-e", "-f/dev/null", *words], log=folder / "log"):
        wait_until(lambda: answers(port), seconds=100, log=folder / "log")
        yield port, environment


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}; see .ci/run")
def test_a_hostfile_starts_stops_and_continues_a_run(tmp_path: Path) -> None:
    directory, log = tmp_path / "two", tmp_path / "log"
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    words = overrides(runs.corpus(), tmp_path, "run.name=two", *runs.TWO)
    port = free_port()
    meeting = [f"--hostfile={hostfile}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    with ssh_server(tmp_path / "ssh") as (ssh_port, environment):
        over_ssh = [f"--ssh_port={ssh_port}", "--no_ssh_check"]
        command = [*DEEPSPEED, *meeting, *over_ssh, "train.py", *words]
        with started(command, log=log, env=environment) as launcher:
            wait_until(lambda: last_step(directory) > 3, seconds=100, log=log)
            with standing_still(directory):
                (directory / "STOP").touch()
            assert launcher.wait(100) == 75, log.read_text()
    with ExitStack() as stack:
        launchers = [
            stack.enter_context(
                started(
                    [*DEEPSPEED, *meeting, "--no_ssh", f"--node_rank={rank}", "train.py", *words],
                    log=log,
                )
            )
            for rank in range(2)
        ]
        assert [launcher.wait(100) for launcher in launchers] == [0, 0], log.read_text()
    check_same_logs(directory, two_undisturbed())


def test_the_example_is_a_hostfile() -> None:
    code = "import sys; from deepspeed.launcher.runner import fetch_hostfile as read\n"
    code += "print(dict(read('launch/hostfile.example')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("{'gpu-01': 8, 'gpu-02': 8}")
