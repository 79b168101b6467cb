"""What stops the index tool is a sentence, and said before the work where that is possible."""

import os
import signal
from pathlib import Path
from typing import NoReturn

import pytest

from data.prepare import index as command
from nmm.config import Kind
from tests import corpora


def flags(folder: Path, *, workers: int) -> list[str]:
    shards = ["--kind", "text", "--shards", f"{folder}/*.tar", "--workers", str(workers)]
    return [*shards, "--tokenizer", str(corpora.tokenizer_path())]


def test_a_worker_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system, when memory ends, in the middle of a shard; what was done is there."""
    corpora.write_shards(tmp_path, kind=Kind.text, name="x", documents=100, per_shard=5, seed=0)

    def ends(*_: object, **__: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    command.main([word.replace("*.tar", "x-00000[0-4].tar") for word in flags(tmp_path, workers=1)])
    with monkeypatch.context() as patched:
        patched.setattr(command, "index_shard", ends)  # workers are forked, and have it too
        with pytest.raises(SystemExit, match=r"^error: a worker was killed .* same command again"):
            command.main(flags(tmp_path, workers=2))
    assert len(list(tmp_path.glob("*.index"))) == 5
    command.main(flags(tmp_path, workers=1))
    assert len(list(tmp_path.glob("*.index"))) == 20


def test_a_list_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    corpora.write_shards(tmp_path, kind=Kind.text, name="x", documents=5, per_shard=5, seed=0)
    with pytest.raises(SystemExit, match=r"^error: --quarantine is .* \(Is a directory\)"):
        command.main([*flags(tmp_path, workers=1), "--quarantine", str(tmp_path)])
    assert not list(tmp_path.glob("*.index"))
