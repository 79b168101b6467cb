"""Unreadable documents: counted by window, listed, and too many of one window stop the run."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from nmm.batch import Dropped
from nmm.checkpoint import Progress
from nmm.errors import UserError
from nmm.quarantine import refuse_bad_windows


def bad(window: int, *, count: int, of: int = 1000) -> list[Dropped]:
    return [Dropped("a", "s.tar", f"{n}", "image_decode", window, of) for n in range(count)]


def after(window: int, progress: Progress) -> Progress:
    """The same progress when the stream stands in `window`, written to disk and read again."""
    stored = json.loads(json.dumps(asdict(progress)))
    return Progress(**{**stored, "stream": {"window": window}})


def judge(progress: Progress, dropped: list[Dropped], *, fraction: float, directory: Path) -> None:
    refuse_bad_windows(progress, dropped, max_bad_fraction=fraction, directory=directory)


@pytest.mark.parametrize(
    ("most", "fraction"), [(100, 0.1), (20, 0.02), (10, 0.01), (3, 0.003), (1000, 1.0)]
)
def test_a_window_is_refused_beyond_the_fraction_and_not_below(
    tmp_path: Path, most: int, fraction: float
) -> None:
    """Of 1,000 documents, whatever other windows had, and whenever the run was resumed."""
    progress = after(4, Progress(bad_documents={"3": 5}))
    judge(progress, bad(4, count=most - 1), fraction=fraction, directory=tmp_path)
    progress = after(4, progress)
    judge(progress, bad(4, count=1), fraction=fraction, directory=tmp_path)
    assert progress.bad_documents == {"4": most}
    judge(after(5, progress), bad(5, count=most), fraction=fraction, directory=tmp_path)
    with pytest.raises(UserError) as refusal:
        judge(after(4, progress), bad(4, count=1), fraction=fraction, directory=tmp_path)
    said = str(refusal.value)
    assert said.startswith(f"{most + 1} of the 1000 documents of window 4 could not be read")
    assert f"data.max_bad_fraction is {fraction}" in said
    assert f"{tmp_path / 'quarantine.jsonl'}" in said
    assert "\n" not in said


def test_only_windows_that_go_on_are_remembered(tmp_path: Path) -> None:
    """A long run keeps a few numbers; a step may end one window and begin the next."""
    progress = Progress()
    for window in range(50):
        progress = after(window, progress)
        judge(progress, bad(window, count=3), fraction=0.01, directory=tmp_path)
        assert progress.bad_documents == {str(window): 3}
        progress = after(window + 1, progress)
        both = [*bad(window, count=2), *bad(window + 1, count=1)]
        judge(progress, both, fraction=0.01, directory=tmp_path)
        assert progress.bad_documents == {str(window + 1): 1}
        progress.bad_documents.clear()
    with pytest.raises(UserError, match=r"^11 of the 100 documents of window 50 could"):
        judge(after(51, progress), bad(50, count=11, of=100), fraction=0.1, directory=tmp_path)


def test_a_short_window_is_judged_by_its_own_size(tmp_path: Path) -> None:
    progress = after(0, Progress())
    judge(progress, bad(0, count=30, of=3000), fraction=0.01, directory=tmp_path)
    with pytest.raises(UserError, match=r"^30 of the 2000 documents"):
        judge(after(0, Progress()), bad(0, count=30, of=2000), fraction=0.01, directory=tmp_path)
