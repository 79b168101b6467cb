"""The run directory: what was asked (config.yaml, overrides.txt) and with what (manifest.json)."""

import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nmm.errors import UserError

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
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory / "config.yaml", config_yaml)
    except OSError as error:
        raise UserError(
            f"run.dir is {directory.parent}, where {directory.name}/config.yaml cannot be written "
            f"({error.strerror}); give a writable run.dir."
        ) from None
    _replace(directory / "overrides.txt", "".join(f"{line}\n" for line in overrides))
    manifest = directory / "manifest.json"
    starts = json.loads(manifest.read_text())["starts"] if manifest.exists() else []
    starts.append(
        {
            **start,
            "time": wall_time(),
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
        }
    )
    _replace(manifest, json.dumps({**facts, "starts": starts}, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
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
