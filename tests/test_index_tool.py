"""What stops the index tool is a sentence, and said before the work where that is possible."""

import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from data.prepare import index as command
from nmm.config import Kind
from tests import corpora


def flags(folder: Path, *, workers: int) -> list[str]:
    shards = ["--kind", "text", "--shards", f"{folder}/*.tar", "--workers", str(workers)]
    return [*shards, "--tokenizer", str(corpora.tokenizer_path())]


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """By the system, when memory ends; the next run finds the work that was done."""
    corpora.write_shards(tmp_path, kind=Kind.text, name="x", documents=400, per_shard=5, seed=0)

    def kill_one() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.0005)
        children[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(SystemExit, match=r"^error: a worker was killed .* same command again"):
        command.main(flags(tmp_path, workers=2))
    killer.join()
    command.main(flags(tmp_path, workers=1))
    assert len(list(tmp_path.glob("*.index"))) == 80


def test_a_list_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    corpora.write_shards(tmp_path, kind=Kind.text, name="x", documents=5, per_shard=5, seed=0)
    with pytest.raises(SystemExit, match=r"^error: --quarantine is .* \(Is a directory\)"):
        command.main([*flags(tmp_path, workers=1), "--quarantine", str(tmp_path)])
    assert not list(tmp_path.glob("*.index"))
