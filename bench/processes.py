"""Running the pipelines: each in an environment of its own, its output and its memory watched."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.05
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def quiet(command: list) -> None:
    """Run a command; its output is shown, and all ends, if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def measured(command: list[str]) -> tuple[dict, int]:
    """The figures that a command prints last, and the peak of its processes' memory together."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        peak = [0]
        watch = threading.Thread(target=_watch, args=(process, peak))
        watch.start()
        output, _ = process.communicate()
        watch.join()
        if process.returncode:
            errors.seek(0)
            sys.exit(f"error: {' '.join(command)}\n{errors.read()[-3000:]}")
    return json.loads(output.splitlines()[-1]), peak[0]


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], _tree_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)


def _tree_bytes(pid: int) -> int:
    """Resident memory of a process and all below it; pages that they share count for each."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0  # it has ended meanwhile
    return resident + sum(_tree_bytes(int(child)) for child in children)
