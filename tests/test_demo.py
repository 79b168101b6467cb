"""`make demo` in small: every step runs and reports, and a second demo changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def demo(directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.demo", "--steps", "12", "--size", "0.04"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_leaves_what_it_promises_and_a_second_one_destroys_nothing(tmp_path: Path) -> None:
    said = demo(tmp_path)
    run = tmp_path / "runs" / "demo"
    assert "nats are known from the picture" in said
    assert "held-out captions name only colours and shapes" in said
    for name in ("loss.png", "captions.png", "captions.jsonl", "evals.jsonl", "manifest.json"):
        assert (run / name).stat().st_size > 0, name
    before = (run / "losses.jsonl").read_bytes()
    assert before.count(b"\n") == 12
    again = demo(tmp_path)
    assert "is finished: all 12 steps are done" in again
    assert (run / "losses.jsonl").read_bytes() == before
