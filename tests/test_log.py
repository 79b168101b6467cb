"""The logs: cut to the restored step, never half a line, and wandb cannot stop a run."""

import errno
import json
import os
import subprocess
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest

from nmm.config import LogConfig, WandbMode
from nmm.heartbeat import Heartbeat
from nmm.log import Console, JsonLog, Lines, RunLog, WandbMirror, duration, read_rows, wandb_id
from tests.launches import wait_until


def test_rows_after_the_restored_step_and_half_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    whole = [{"step": step, "loss": step / 7} for step in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole) + '{"step": 6, "lo')
    assert read_rows(path) == whole
    log = JsonLog(path, keep_until_step=3)
    log.write({"step": 4, "loss": 0.5})
    assert read_rows(path) == [*whole[:3], {"step": 4, "loss": 0.5}]  # readable before it is closed
    log.close()
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("half", ["", '{"step": 6, "lo', "x" * 200_000])
def test_no_line_is_added_to_a_half_one(tmp_path: Path, half: str) -> None:
    """As a kill leaves it, in alarms as well, which are not cut at a step."""
    path, whole = tmp_path / "alarms.jsonl", '{"step": 5}\n'
    for before in ("", whole):
        path.write_text(before + half)
        with closing(Lines(path)) as lines:
            lines.write('{"step": 7}')
        assert path.read_text() == before + '{"step": 7}\n'


def test_a_checkpoint_counts_on_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that could not keep what it was given gets it again."""
    on_disk: dict[str, str] = {}
    fsync, fails = os.fsync, [True]

    def noted(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").readlink()
        if path.name == "losses.jsonl" and fails:
            fails.pop()
            raise OSError(errno.EIO, "Input/output error")
        fsync(file)
        on_disk[path.name] = path.read_text()

    monkeypatch.setattr(os, "fsync", noted)
    with closing(opened(tmp_path)) as log:
        for step in (1, 2):
            log.evaluation({"step": step, "loss": 7.0})
            log.quarantine({"step": step})
            log.alarm("a", step=step, about="checkpoint")
        log.losses({"step": 2, "tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0, "lr": 0.1})
        with pytest.raises(OSError, match="Input/output"):
            log.sync()
        assert (tmp_path / "losses.jsonl").read_text() == ""
        log.sync()
        found = {path.name: path.read_text() for path in tmp_path.glob("*.*")}
        assert on_disk == found
    assert [row["step"] for row in read_rows(tmp_path / "losses.jsonl")] == [2]
    assert len(on_disk) == 6


def test_a_disk_that_cannot_even_be_cut_gets_no_row_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "losses.jsonl"
    path.write_text("0\n")
    with closing(Lines(path)) as lines:
        lines.write("1")
        with monkeypatch.context() as patched:
            for name in ("fsync", "ftruncate"):
                patched.setattr(os, name, fails)
            with pytest.raises(OSError, match="Input/output"):
                lines.sync()
            lines.write("2")
            with pytest.raises(OSError, match="Input/output"):
                lines.sync()
        lines.write("3")
        lines.sync()
        lines.write("4")
    assert path.read_text() == "0\n1\n2\n3\n4\n"


def test_a_log_that_somebody_made_shorter_is_not_filled_with_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "losses.jsonl"
    path.write_text("0\n1\n")
    with closing(Lines(path)) as lines:
        os.truncate(path, 2)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fails)
            with pytest.raises(OSError, match="Input/output"):
                lines.sync()
        lines.write("2")
    assert path.read_bytes() == b"0\n2\n"


def test_the_cost_of_a_row_does_not_grow_with_those_before_it(tmp_path: Path) -> None:
    """In bytes that move in memory, where a clock would depend on the machine."""
    with closing(Lines(tmp_path / "losses.jsonl")) as lines:
        peaks: list[int] = []
        lines.write("x" * 2**23)
        for _ in range(9):
            tracemalloc.start()
            lines.write("x" * 2**10)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert sorted(peaks)[4] < 2**20  # some need a larger buffer


def opened(directory: Path) -> RunLog:
    return RunLog(
        directory,
        LogConfig(wandb=WandbMode.off),
        is_main=True,
        settings={},
        first_step=0,
        total_steps=5,
        heartbeat=Heartbeat(directory, rank=0),
    )


def test_a_run_from_scratch_keeps_no_row_of_an_earlier_try(tmp_path: Path) -> None:
    (tmp_path / "evals.jsonl").write_text('{"step": 0, "loss": 8.0}\n')
    log = opened(tmp_path)
    log.evaluation({"step": 0, "loss": 7.0})
    log.close()
    assert read_rows(tmp_path / "evals.jsonl") == [{"step": 0, "loss": 7.0}]


def test_a_missing_log_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_failure_of_wandb_is_said_once_and_switches_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Online without a key is what wandb itself refuses."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in a file either
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    mirror = WandbMirror(
        LogConfig(wandb=WandbMode.online), directory=tmp_path, name="run", settings={}
    )
    mirror.write({"step": 1, "loss": 2.0}, prefix="train")
    mirror.close()
    said = capsys.readouterr().err
    assert said.count("wandb is switched off for this run") == 1


def test_wandb_failing_in_the_middle_is_said_once_and_training_rows_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else ends the run of wandb, which then refuses every further row."""
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    remote = "https://a-token@host/code.git"  # of the code that is run from here
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    offline = LogConfig(wandb=WandbMode.offline, wandb_group="a_study")
    settings = {"parent": {"run": "runs/a_trunk", "step": 7, "mode": "branch"}}
    log = RunLog(
        tmp_path,
        offline,
        is_main=True,
        settings=settings,
        first_step=0,
        total_steps=3,
        heartbeat=Heartbeat(tmp_path, rank=0),
    )
    row = {"tokens": 8, "loss/modality/text": 3.0, "tokens_per_second": 9.0, "lr": 0.1}
    rows = [{"step": step, "seconds": 1.0, **row} for step in (1, 2, 3)]
    log.losses(rows[0])
    assert capsys.readouterr().err == ""
    (begun,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    link = f"branch of a_trunk at step 7, wandb id {wandb_id(Path('runs/a_trunk').absolute())}"
    wandb.finish()
    words = [word.encode() for word in ("a_study", link)]  # its service writes in its own time
    wait_until(
        lambda: all(word in begun.read_bytes() for word in words),
        seconds=60,
        log=tmp_path / "console.log",
    )
    assert b"a-token" not in begun.read_bytes()
    log.losses(rows[1])
    log.evaluation({"step": 2, "loss": 4.0})
    log.losses(rows[2])
    log.close()
    assert capsys.readouterr().err.count("wandb is switched off for this run") == 1
    assert read_rows(tmp_path / "losses.jsonl") == rows
    assert read_rows(tmp_path / "evals.jsonl") == [{"step": 2, "loss": 4.0}]
    console = (tmp_path / "console.log").read_text()
    assert [line.split("/")[0] for line in console.splitlines()] == [
        "step 1",
        "step 2",
        "held-out loss at step 2: 4.000  ()",
        "step 3",
    ]


def test_the_console_says_what_a_person_wants_to_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(tmp_path / "console.log", first_step=1, total_steps=100)
    row = {"tokens": 2048, "loss/modality/text": 3.21, "tokens_per_second": 900.0, "lr": 1e-3}
    console.row({"step": 2, "seconds": 50.0, **row})  # the first step of a start is slow
    console.row({"step": 3, "seconds": 2.0, **row})
    console.close()
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert lines[1] == (
        "step 3/100  tokens 2,048  loss text 3.210  900 tokens/s  lr 1.00e-03  ETA 3:14"
    )
    assert capsys.readouterr().out.splitlines() == lines[:1]  # a pipe gets a line every 5 seconds


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0:00"), (59.6, "1:00"), (187, "3:07"), (3723, "1:02:03")]
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
