"""Kill a random process of a run at random moments, again and again: `python -m tests.soak`.

Two processes train on three sources with images. One image is cut short, small sources are read
several times, and the weights change halfway. A third of the kills waits for a checkpoint being
written, a tenth comes while processes start, the others in any phase of a step. torchrun starts
again after some of the kills; after the others its launcher fails and is started again.
Whatever falls where, the logs at the end are those of a run that nobody disturbed, to the bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from nmm import heartbeat
from nmm.heartbeat import Phase
from tests import runs
from tests.launches import check_same_logs, pid_of_rank, started
from tests.runs import overrides

STEPS_PER_KILL, STEPS_AT_LEAST = 8, runs.TWO_STEPS
STEPS_BEHIND = 15  # after the last kill is due, so that the run does not end before it
CHECKPOINT_EVERY = 4
LAUNCH_SECONDS = 600.0  # of one launch with all its restarts; longer is a hang
GONE_SECONDS = 15.0  # what a killed process has started may outlive its launcher so long
RESTARTS = b"TORCHELASTIC_RESTART_COUNT="
MARK = "NMM_SOAK"  # in the environment of all that a launch starts


class When(Enum):
    """What a process does that is to be killed."""

    step = "in a step"
    saving = "while saving"
    start = "while starting"


@dataclass(frozen=True)
class Kill:
    """SIGKILL to a process, `seconds` after it has begun what `when` says, not before `step`."""

    rank: int
    when: When
    step: int
    seconds: float


@dataclass
class Seen:
    """What became of the kills: who died, as (rank, pid), and in which `phases`.

    `beside`: starts that found an incomplete checkpoint newer than the one they went on from.
    """

    killed: list[tuple[int, int]] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    manifest_ns: int = 0
    beside: int = 0
    exit_codes: list[int] = field(default_factory=list)
    gone_after_seconds: float = 0.0

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {count}" for phase, count in self.phases.most_common())
        codes = ", ".join(f"{n} with {code}" for code, n in Counter(self.exit_codes).items())
        return (
            f"{self.phases.total()} kills ({phases}); {self.starts} starts, {self.beside} of them "
            f"beside an incomplete newer checkpoint; launches ended: {codes}; the last process "
            f"was gone {self.gone_after_seconds:.1f} s after its launcher"
        )


def steps_for(kills: int) -> int:
    """The length of a run that is long enough for as many kills."""
    return max(STEPS_AT_LEAST, STEPS_PER_KILL * kills + STEPS_BEHIND)


def planned(kills: int, *, seed: int, starting: bool = True) -> list[Kill]:
    """Kills in the order of their steps; the same for the same seed."""
    draw = random.Random(seed)
    steps = sorted(draw.randrange(2, steps_for(kills) - STEPS_BEHIND) for _ in range(kills))
    kinds = [When.saving, When.step, When.step] * kills
    if starting:
        kinds[9::10] = [When.start] * len(kinds[9::10])
    longest = {When.step: 0.08, When.saving: 0.008, When.start: 5.0}
    return [
        Kill(
            draw.randrange(2),
            when,
            0 if when is When.start else step,
            draw.random() * longest[when],
        )
        for when, step in zip(kinds[:kills], steps, strict=True)
    ]


def words(directory: Path, *, name: str, steps: int) -> list[str]:
    """The overrides of a run that meets an epoch border, a bad sample and a weight change."""
    return overrides(
        runs.corpus(),
        directory,
        f"run.name={name}",
        *runs.TWO,
        f"schedule.total_steps={steps}",
        f"checkpoint.every_steps={CHECKPOINT_EVERY}",
        f"evaluation.every_steps={steps // 2}",
        f"data.weight_changes=[{{step:{steps // 2},weights:{{text:0.5}}}}]",
    )


def undisturbed(directory: Path, *, steps: int) -> Path:
    """The run directory of a run that nobody kills."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    done = runs.run([*program, *words(directory, name="whole", steps=steps)])
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "whole"


def disturbed(directory: Path, kills: list[Kill], *, restarts: int) -> Seen:
    """Start the run directory/killed until it ends with 0; assert what must hold on the way."""
    launcher = [sys.executable, "-m", "launch.torchrun", "--processes=2", f"--restarts={restarts}"]
    arguments = [*launcher, "--", *words(directory, name="killed", steps=steps_for(len(kills)))]
    seen, left = Seen(), list(kills)
    while 0 not in seen.exit_codes:
        mark = uuid.uuid4().hex
        before = seen.phases.total()
        with started(arguments, log=directory / "log", env={MARK: mark}) as launch:
            code = one_launch(launch, directory, left, seen)
            ended_at = time.monotonic()
            while alive := marked(mark):
                assert time.monotonic() - ended_at < GONE_SECONDS, f"still there: {alive}"
                time.sleep(0.1)
            gone_after = time.monotonic() - ended_at
        # It can only fail when every restart it had was used up.
        here = seen.phases.total() - before
        assert code == 0 or here == restarts + 1, f"{here} kills\n{tail(directory)}"
        seen.exit_codes.append(code)
        seen.gone_after_seconds = max(seen.gone_after_seconds, gone_after)
        print(seen, flush=True)
    assert not left, f"the run ended before {left}"
    return seen


def one_launch(launch: subprocess.Popen, directory: Path, left: list[Kill], seen: Seen) -> int:
    """Do what is due of the kills until the launcher ends; its exit code."""
    run, deadline = directory / "killed", time.monotonic() + LAUNCH_SECONDS
    pid, began = None, 0.0
    life = 0  # torchrun's count of restarts; one kill ends a life, and a second would be pointless
    while launch.poll() is None:
        assert time.monotonic() < deadline, f"a launch hangs; {seen}; {tail(directory)}"
        check_starts(run, seen)
        if pid is None or is_gone(pid):
            time.sleep(0.01)
            found = pid_of(launch.pid, left[0].rank) if left else None
            pid, began = found if restarts_before(found) == life else None, time.monotonic()
            continue
        time.sleep(0.0005)  # a save takes some milliseconds
        kill = left[0]
        if kill.when is When.start and time.monotonic() < began + kill.seconds:
            continue
        if kill.when is not When.start:
            if not is_due(kill, run, pid=pid):
                continue
            time.sleep(kill.seconds)
        if end(pid):
            life += 1
            seen.killed.append((kill.rank, pid))
            seen.phases[died_in(run, kill.rank, pid=pid)] += 1
            left.pop(0)
    check_starts(run, seen)
    return launch.returncode


def is_due(kill: Kill, run: Path, *, pid: int) -> bool:
    """Has the process begun what it is to be killed in?"""
    place = heartbeat.read(run, kill.rank)
    if place is None or place.pid != pid or place.step < max(kill.step, 1):
        return False
    return kill.when is When.step or place.phase == Phase.checkpoint.value


def end(pid: int) -> bool:
    """Kill a process and wait until it does nothing more; False when it had left."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    while not is_gone(pid):
        time.sleep(0.001)
    return True


def is_gone(pid: int) -> bool:
    """Is a process no more, or only a name that its parent has not yet asked for?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def died_in(run: Path, rank: int, *, pid: int) -> str:
    """The phase that the file of a dead process tells."""
    place = heartbeat.read(run, rank)
    return place.phase if place is not None and place.pid == pid else Phase.start.value


def check_starts(run: Path, seen: Seen) -> None:
    """A start goes on from the newest complete checkpoint, whatever lies beside it.

    It is looked at before the run has saved so often that this one is removed.
    """
    manifest = run / "manifest.json"
    written_ns = manifest.stat().st_mtime_ns if manifest.exists() else 0
    if written_ns == seen.manifest_ns:
        return
    seen.manifest_ns, starts = written_ns, json.loads(manifest.read_text())["starts"]
    if len(starts) == seen.starts:
        return
    found = sorted((run / "checkpoints").glob("step_*"))
    # Those of this start itself are younger.
    complete = [path for path in found if is_older(path / "COMPLETE", written_ns)]
    newest = int(complete[-1].name.removeprefix("step_")) if complete else 0
    assert starts[-1]["step"] == newest, (starts[-1], found)
    seen.beside += bool(found) and found[-1] not in complete
    seen.starts = len(starts)


def is_older(path: Path, than_ns: int) -> bool:
    """Was a file there before that moment?"""
    try:
        return path.stat().st_mtime_ns < than_ns
    except FileNotFoundError:
        return False


def pid_of(launcher: int, rank: int) -> int | None:
    """The process that trains as `rank`, if it is there yet."""
    try:
        return pid_of_rank(launcher, rank)
    except AssertionError:
        return None


def restarts_before(pid: int | None) -> int | None:
    """How often torchrun had restarted its processes when it started this one, if it is there."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    counts = [word.partition(b"=")[2] for word in words if word.startswith(RESTARTS)]
    return int(counts[0]) if counts else None


def marked(mark: str) -> list[int]:
    """The processes that a launch has started, also those whose parents are gone."""
    found, word = [], f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if word in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def tail(directory: Path) -> str:
    """The end of what the launches printed."""
    return (directory / "log").read_text()[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--restarts", type=int, default=3, help="of a launch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    options = parser.parse_args()
    kills = planned(options.kills, seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="nmm-soak-") as scratch:
        directory = Path(scratch)
        whole = undisturbed(directory, steps=steps_for(options.kills))
        seen = disturbed(directory, kills, restarts=options.restarts)
        check_same_logs(directory / "killed", whole)
    print(f"{seen}. The logs equal those of a run that nobody disturbed, to the bit.")


if __name__ == "__main__":
    main()
