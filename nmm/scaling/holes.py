"""Is a loss log whole? Steps that are missing from it, or there twice, make a run no evidence."""

import re
from pathlib import Path

import numpy as np

EVERY = re.compile(rb"^log:\n(?:  .*\n)*?  every_steps: (\d+)$", re.MULTILINE)
STEP = re.compile(rb'^\{"step": (\d+)', re.MULTILINE)  # a row begins with its step


def hole_in(directory: Path, *, first_step: int) -> str | None:
    """What is wrong with the steps of losses.jsonl after `first_step`; None if they are all there.

    Rows are at most log.every_steps apart. A run that does not tell this is not judged.
    """
    every = _every_steps(directory / "config.yaml")
    if every is None:
        return None
    found = STEP.findall((directory / "losses.jsonl").read_bytes())
    steps = np.concatenate([[first_step], np.array(found, dtype=np.int64)])
    gaps = np.diff(steps)
    wrong = np.flatnonzero((gaps <= 0) | (gaps > every))
    if not len(wrong):
        return None
    before, after = steps[wrong[0]], steps[wrong[0] + 1]
    return f"its loss log goes from step {before} to step {after}, and has a row every {every}"


def _every_steps(path: Path) -> int | None:
    """log.every_steps of a config.yaml, which takes a hundred times as long to parse."""
    found = EVERY.search(path.read_bytes()) if path.exists() else None
    return int(found[1]) if found else None
