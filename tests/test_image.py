"""The Dockerfile without Docker: its rules, and its steps in a clean folder."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.conftest import unlisted_skips
from tests.test_structure import ROOT

Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """(keyword, the rest of its line) of the Dockerfile, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(keyword, rest.strip()) for keyword, _, rest in (line.partition(" ") for line in lines)]


def run_lines() -> list[str]:
    return [rest for keyword, rest in instructions() if keyword == "RUN"]


def test_the_image_is_pinned_and_nobodys_root() -> None:
    steps = instructions()
    base = dict(rest.split("=", 1) for keyword, rest in steps if keyword == "ARG" and "=" in rest)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base["BASE"])
    users = [rest for keyword, rest in steps if keyword == "USER"]
    assert users == ["nmm"]
    as_user = steps[steps.index(("USER", "nmm")) :]
    assert [rest for keyword, rest in as_user if keyword == "RUN"] == ["launch/install.sh"]
    # What changes often comes last, so that the layers before it stay.
    assert steps[-2:] == [("COPY", "--chown=nmm . ."), ("CMD", '["make", "help"]')]


def test_its_steps_are_scripts_of_the_project() -> None:
    """And little else: accounts, folders, and what makes a layer small."""
    known = ("launch/install.sh", "/tmp/packages.sh run", "useradd ", "install --directory ", "rm ")
    parts = [part.strip() for line in run_lines() for part in line.split("&&")]
    assert [part for part in parts if not part.startswith(known)] == []
    assert ("COPY", "launch/packages.sh /tmp/") in instructions()


def test_the_environment_is_made_in_a_clean_folder(tmp_path: Path) -> None:
    """From the files that the Dockerfile copies, by its own line; small packages stand for large.

    FULL_INSTALL=1 installs everything, as `make check-image` does.
    """
    folder, full = tmp_path / "nmm", bool(os.environ.get("FULL_INSTALL"))
    copies = [rest.split() for keyword, rest in instructions() if keyword == "COPY"]
    for *sources, target in copies[1:-1]:
        for source in sources:
            (folder / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, folder / target)
    lock = folder / "requirements.lock"
    if not full:
        small = re.findall(r"^(?:filelock|braceexpand)==.*$", lock.read_text(), re.MULTILINE)
        lock.write_text("".join(f"{line}\n" for line in small))
    chosen = {} if full else {"TORCH": "mpmath==1.3.0"}
    environment = {**os.environ, "VENV": str(tmp_path / "venv"), **chosen}

    def install() -> str:
        (line,) = [line for line in run_lines() if line == "launch/install.sh"]
        done = subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "is ready after" in install()
    assert "is up to date" in install()
    python = tmp_path / "venv" / "bin" / "python"
    code = "import torch, deepspeed" if full else "import mpmath, filelock, braceexpand"
    assert subprocess.run([python, "-c", code], cwd=folder).returncode == 0
    lock.write_text(lock.read_text() + "\n# changed\n")
    assert "is ready after" in install()


def test_packages_are_asked_for_by_purpose() -> None:
    done = subprocess.run(["launch/packages.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "launch/packages.sh run" in done.stderr


def test_a_skip_that_nobody_listed_is_found() -> None:
    allowed = "# why\n@gpu none here\ntests/test_a.py::test_x no server\n"
    skipped = {
        "tests/test_a.py::test_x[1]": ["test_x[1]"],
        "tests/test_b.py::test_y": ["test_y", "gpu"],
        "tests/test_c.py::test_z": ["test_z", "skipif"],
    }
    assert unlisted_skips(skipped, allowed=allowed) == ["tests/test_c.py::test_z"]
    assert unlisted_skips(skipped, allowed="") == list(skipped)
