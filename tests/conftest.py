"""What all tests share: tests of GPUs are skipped without one; no skip goes unnoticed in CI."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nmm.parallel import World


@pytest.fixture(scope="module")
def world() -> Iterator["World"]:
    """This process alone, as a run has it."""
    from nmm import parallel  # here, because it imports torch

    yield parallel.start()
    parallel.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `gpu` is skipped, and says why, without a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, because it takes seconds and most runs have nothing marked

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device on this machine"))


def unlisted_skips(skipped: dict[str, list[str]], *, allowed: str) -> list[str]:
    """The tests of {name: its marks} that no line of `allowed` covers.

    A line is the beginning of a name, or a mark like @gpu, and then why; # begins a comment.
    """
    words = [line.split()[0] for line in allowed.splitlines() if line and line[0] != "#"]
    marks = {word.removeprefix("@") for word in words if word.startswith("@")}
    beginnings = tuple(word for word in words if not word.startswith("@"))
    return [
        name
        for name, own in skipped.items()
        if not name.startswith(beginnings) and not marks.intersection(own)
    ]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With ALLOWED_SKIPS, a file, the session fails by any skip that is not listed there."""
    path = os.environ.get("ALLOWED_SKIPS")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not path or reporter is None:
        return
    skipped = {report.nodeid: list(report.keywords) for report in reporter.stats.get("skipped", [])}
    unlisted = unlisted_skips(skipped, allowed=Path(path).read_text())
    if unlisted:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"\nskipped, and not listed in {path}: {', '.join(unlisted)}", red=True)
