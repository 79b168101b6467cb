"""Printing that a reader may leave in the middle of: `fit ... | head` still writes its files."""

import os
import sys


def say(text: str) -> None:
    """A line, or nothing once nobody reads."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it serves until the end
