"""A Slurm of two nodes on this machine: real daemons, in a folder and on ports of their own."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launches import started
from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")

# Jobs of `high` take the nodes of jobs of `low`, which get GraceTime and go back into the queue. A
# requeued job waits until the credential of its last start has expired: two minutes by default.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmctldPort={ports[0]}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10
"""


def missing() -> str | None:
    """Why there can be no Slurm here."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}); see .ci/run"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


@dataclass(frozen=True)
class Cluster:
    environment: dict[str, str]

    def ask(self, *words: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows, by key."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in shown.split())

    def wait_for(self, job: str, state: str, *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.state(job)["JobState"] != state:
            assert time.monotonic() < deadline, self.state(job)
            time.sleep(0.2)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the daemons; at the end jobs are killed and nothing is left."""
    # munged insists on a path that everybody may enter.
    folder = Path(tempfile.mkdtemp(prefix="nmm-slurm-"))
    folder.chmod(0o755)
    (folder / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=free_ports(3)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    munged = [
        *("munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket"),
        *(f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")),
    ]
    conf = ["-D", "-f", f"{folder}/slurm.conf"]
    daemons = [munged, ["slurmctld", *conf], *(["slurmd", *conf, "-N", n] for n in ("n1", "n2"))]
    there = Cluster({**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"})
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for daemon in daemons:
            stack.enter_context(started(daemon, log=folder / "daemons", env=there.environment))
        stack.callback(end_jobs, there)
        deadline = time.monotonic() + 30
        while "idle" not in (sinfo(there) or ""):
            assert time.monotonic() < deadline, (folder / "daemons").read_text()[-2000:]
            time.sleep(0.2)
        yield there


def sinfo(there: Cluster) -> str | None:
    """The state of both nodes if it is the same, None while nobody answers."""
    words = ["sinfo", "--noheader", "--nodes=n1,n2", "--format=%T"]
    done = subprocess.run(words, env=there.environment, capture_output=True, text=True)
    lines = set(done.stdout.split())
    return lines.pop() if len(lines) == 1 else None


def end_jobs(there: Cluster) -> None:
    for signal in ("KILL", "TERM"):
        there.ask("scancel", f"--signal={signal}", "--full", "--user=root")
    there.ask("scancel", "--user=root")
    deadline = time.monotonic() + 20
    while there.ask("squeue", "--noheader").strip() and time.monotonic() < deadline:
        time.sleep(0.2)
