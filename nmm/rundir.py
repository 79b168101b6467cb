"""The run directory: what was asked (config.yaml, overrides.txt) and with what (manifest.json)."""

import fcntl
import json
import os
import platform
import struct
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nmm.errors import UserError

CONFIG, MANIFEST = "config.yaml", "manifest.json"
FLOCK = "hhqqi"  # struct flock of 64-bit Linux: kind, whence, start, length, process
PACKAGES = ("torch", "deepspeed", "webdataset", "sentencepiece", "pillow", "simplejpeg", "numpy")


def wall_time() -> str:
    """The moment, in UTC, as ISO 8601 with seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write(
    directory: Path, *, config_yaml: str, overrides: list[str], facts: dict[str, Any], start: dict
) -> None:
    """Describe a start of the run; `facts` hold for its whole life, every `start` joins a list.

    A start holds the step it continues from and the number of processes; commit, versions and
    time are added.
    """
    write_whole(directory / CONFIG, config_yaml)
    write_whole(directory / "overrides.txt", "".join(f"{line}\n" for line in overrides))
    manifest = directory / MANIFEST
    starts = _starts(manifest)
    starts.append(
        {
            **start,
            "time": wall_time(),
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
        }
    )
    write_whole(manifest, json.dumps({**facts, "starts": starts}, indent=1) + "\n")


def end(directory: Path, *, how: str, step: int, is_main: bool) -> None:
    """Note at the last start how it ended and after which step; one without a note was cut off.

    A disk that is full by now takes nothing from what was trained and saved.
    """
    if not is_main:
        return
    manifest = directory / MANIFEST
    stored = json.loads(manifest.read_text())
    stored["starts"][-1]["ended"] = {"how": how, "step": step, "time": wall_time()}
    try:
        write_whole(manifest, json.dumps(stored, indent=1) + "\n")
    except OSError as error:
        print(f"ALARM: {manifest} does not say that the run {how}: {error}", file=sys.stderr)


def lock(directory: Path, *, is_main: bool) -> AbstractContextManager:
    """Make the run directory and hold it for this run; raises UserError when another run does.

    A record lock belongs to the process: helper processes do not inherit it, and it is gone with
    the process, however that ends. Processes other than the main one hold nothing.
    """
    if not is_main:
        return nullcontext()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"run.dir is {directory.parent}, where {directory.name}/ cannot be written "
            f"({error.strerror}); give a writable run.dir."
        ) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"{directory} is being trained by another process; wait for it or stop it, or choose "
            f"another run.name."
        ) from None
    return file


def is_locked(directory: Path) -> bool:
    """Is a run being trained there now, by this machine or one that shares the folder?

    Asks without taking the lock, so that a run that starts at this moment is not refused.
    """
    path = directory / "lock"
    if not path.exists():
        return False
    with path.open("rb") as file:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_ = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return kind != fcntl.F_UNLCK


def _starts(manifest: Path) -> list[dict]:
    """The starts that a manifest tells of; raises UserError for one that is damaged."""
    if not manifest.exists():
        return []
    try:
        starts = json.loads(manifest.read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        starts = None
    if not isinstance(starts, list):
        raise UserError(f"{manifest} is damaged; restore it, or move it away.")
    return starts


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename, so that a kill leaves the old file or the new one."""
    beside = path.with_suffix(".part")
    beside.write_text(text)
    beside.replace(path)


def git_commit() -> str | None:
    """The commit of the code, "+changes" when files differ from it; None outside a git checkout."""
    code = Path(__file__).parent
    try:
        commit = _git("rev-parse", "HEAD", cwd=code)
        return commit + ("+changes" if _git("status", "--porcelain", cwd=code) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str, cwd: Path) -> str:
    run = subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True, text=True)
    return run.stdout.strip()
