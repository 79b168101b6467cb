"""Documents that were planned and could not be read: too many in one window stop the run."""

from collections.abc import Sequence
from pathlib import Path

from nmm.batch import Dropped
from nmm.checkpoint import Progress
from nmm.errors import UserError
from nmm.log import read_rows

FILE = "quarantine.jsonl"
NAMED = 5


def refuse_bad_windows(
    progress: Progress, dropped: Sequence[Dropped], *, max_bad_fraction: float, directory: Path
) -> None:
    """Count the unreadable documents of a step by their window, and refuse a window with too many.

    `progress` keeps the counts of the windows that go on after this step. Every process has the
    same counts, so all of them stop.
    """
    assert progress.stream is not None
    bad = progress.bad_documents
    for document in dropped:
        window = str(document.window)
        bad[window] = bad.get(window, 0) + 1
    for document in dropped:
        found, planned = bad[str(document.window)], document.window_documents
        if found > max_bad_fraction * planned:
            raise UserError(
                f"{found} of the {planned} documents of window {document.window} could not be read "
                f"and data.max_bad_fraction is {max_bad_fraction}; the first are "
                f"{_first(directory, window=document.window)}, and {directory / FILE} lists all; "
                f"raise data.max_bad_fraction to go on, or repair the shards and start another run "
                f"with run.name=NEW."
            )
    for window in [window for window in bad if int(window) < progress.stream["window"]]:
        del bad[window]


def _first(directory: Path, *, window: int) -> str:
    """The first documents of a window that the file lists, with their reasons."""
    rows = read_rows(directory / FILE)
    here = [row for row in rows if (row["split"], row["window"]) == ("train", window)]
    return ", ".join(f"{row['shard']}/{row['key']} ({row['reason']})" for row in here[:NAMED])
