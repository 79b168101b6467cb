"""Checkpoints on disks that are full, and files that are cut or changed; really so."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from nmm import begin, rundir
from nmm.checkpoint import Progress, complete, make_room, step_of
from nmm.config import CheckpointConfig
from nmm.errors import UserError
from nmm.intact import SET_ASIDE, damage_of, newest_intact
from nmm.log import JsonLog, read_rows
from nmm.pieces import (
    PIECES,
    WEIGHT,
    Piece,
    Share,
    Stored,
    Written,
    path_of,
    write_pieces,
    write_shares,
)
from nmm.sums import MARKER, Sum, fault_of, write_text
from tests import runs
from tests.runs import environment


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of 4 MiB, for those who may mount one."""
    path = tmp_path_factory.mktemp("small")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def small_disk(mounted: Path | None) -> Path:
    if mounted is None:
        pytest.skip("only root can mount a small disk")
    return mounted


@pytest.fixture(scope="module")
def launched(mounted: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of tests/saving_cases.py are, and what they said."""
    directory = tmp_path_factory.mktemp("saving")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.saving_cases",
            str(directory),
            *([mounted] if mounted else []),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (directory / "said").write_text(done.stdout + done.stderr)
    return directory


def test_files_that_were_cut_or_changed_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    expected = write_text(path, "some words")
    assert (expected.num_bytes, fault_of(path, expected=expected)) == (10, None)
    path.write_text("some wordz")
    assert fault_of(path, expected=expected) == "a has another checksum"
    path.write_text("some")
    assert fault_of(path, expected=expected) == "a has 4 bytes instead of 10"
    path.unlink()
    assert fault_of(path, expected=expected) == "a is not there"


def test_a_disk_that_fails_damages_nothing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    sums = {"state.json": write_text(checkpoint / "state.json", "{}"), "a.pt": Sum(3, 0)}
    write_text(checkpoint / MARKER, json.dumps(sums))
    (checkpoint / "a.pt").symlink_to("a.pt")  # every look at it is an error of the file system
    with pytest.raises(UserError, match=r"cannot be read .*bring its disk back"):
        newest_intact(tmp_path)
    assert complete(tmp_path) == [checkpoint]
    (checkpoint / "a.pt").unlink()
    with pytest.raises(UserError, match=r"damaged \(a.pt is not there\)"):
        newest_intact(tmp_path)
    (checkpoint / MARKER).unlink()
    (checkpoint / MARKER).symlink_to("/proc/self/mem")  # it opens, and reading it is an error
    older = checkpoint.with_name("step_00000004")
    older.mkdir()
    write_text(older / MARKER, "{}")
    with pytest.raises(UserError, match=r"cannot be read \(\[Errno 5\].*move this checkpoint away"):
        newest_intact(tmp_path)
    checkpoint.rename(tmp_path / "away")
    assert newest_intact(tmp_path).checkpoint == older


def test_only_what_is_damaged_is_called_so(tmp_path: Path) -> None:
    """Nobody is told to delete a checkpoint because a memory is full or a file cannot be opened."""
    piece = Piece("a", start=0, offset=0, numel=2**20)
    sums = {path_of(tmp_path, 0).name: write_shares(tmp_path, [share_of(piece)], process=0)}
    written = Written(1, 1, [WEIGHT], 1, 1, shapes={"a": [2**20]}, files=[[[piece]]])
    sums[PIECES] = write_pieces(tmp_path, written)
    write_text(tmp_path / MARKER, json.dumps(sums))

    def read() -> None:
        with damage_of(tmp_path):
            assert len(dict(Stored(tmp_path).weights())) == 1

    read()
    with pytest.raises(RuntimeError, match="can't allocate memory"), damage_of(tmp_path):
        torch.empty(2**50)
    for wrong in (AssertionError, KeyError, ValueError, FileNotFoundError):  # a program, no file
        with pytest.raises(wrong, match="nvcc"), damage_of(tmp_path):
            raise wrong("nvcc")
    path, data = path_of(tmp_path, 0), path_of(tmp_path, 0).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    told = (
        rf"is damaged \({path.name} has {len(data) // 2} bytes instead of {len(data)}\); delete it"
    )
    with pytest.raises(UserError, match=told):
        read()
    path.unlink()
    with pytest.raises(UserError, match=rf"is damaged \({path.name} is not there\); delete it"):
        read()
    path.symlink_to(path.name)  # every look at it is an error of the file system
    with pytest.raises(UserError, match=r"cannot be read .* bring its disk back"):
        read()
    with pytest.raises(torch.OutOfMemoryError), damage_of(tmp_path):  # nobody looks at the files
        raise torch.OutOfMemoryError
    path.unlink()
    path.write_bytes(data)
    (tmp_path / PIECES).write_text("{}")
    with pytest.raises(
        UserError, match=rf"is damaged \({PIECES} has 2 bytes instead of .*delete it"
    ):
        read()


def share_of(piece: Piece) -> Share:
    return Share({WEIGHT: torch.ones(piece.numel)}, [piece])


def test_a_disk_that_is_full_at_the_end_takes_nothing_from_a_finished_run(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is trained and saved, only that is not noted; it is no failure of the run."""
    manifest = small_disk / rundir.MANIFEST
    manifest.write_text('{"starts": [{"step": 0}]}')
    with suppress(OSError), (small_disk / "other").open("wb", buffering=0) as file:
        while file.write(bytes(2**12)):
            pass
    rundir.end(small_disk, how="finished", step=8, is_main=True)
    said = capsys.readouterr().err
    assert f"ALARM: {manifest} does not say that the run finished: [Errno 28] No space" in said
    assert manifest.read_text() == '{"starts": [{"step": 0}]}'
    (small_disk / "other").unlink()
    rundir.end(small_disk, how="finished", step=8, is_main=True)
    assert '"how": "finished"' in manifest.read_text()
    manifest.unlink()


@pytest.mark.parametrize(
    ("alarms", "first"),
    [
        ([], 100),
        ([100], 110),
        ([40, 100, 110], 120),  # the one of a stop that could not be saved
        ([500], 100),  # checkpoints were written before it
        ([100, 500], 110),
    ],
)
def test_only_alarms_from_the_first_on_excuse_a_missing_checkpoint(
    tmp_path: Path, alarms: list[int], first: int
) -> None:
    rows = [{"step": step, "about": "checkpoint"} for step in alarms]
    lines = [json.dumps(row) + "\n" for row in [{"step": 90, "about": "upload"}, *rows]]
    (tmp_path / "alarms.jsonl").write_text("".join(lines))
    config = CheckpointConfig(every_steps=100)
    assert begin.first_try(tmp_path, Progress(), config) == first


def test_the_sum_of_a_file_that_torch_wrote_is_that_of_its_bytes(tmp_path: Path) -> None:
    shares = [Share({"weight": torch.arange(9.0), "exp_avg": torch.ones(9)}, [])]
    found = write_shares(tmp_path, shares, process=3)
    assert fault_of(tmp_path / "states_00003.pt", expected=found) is None
    assert found.num_bytes > 72


def test_what_a_full_disk_refuses_of_a_log_waits(small_disk: Path) -> None:
    """A row may be cut anywhere, and comes whole when there is room."""
    whole = [{"step": step, "text": "x" * 1000} for step in range(20)]
    log = JsonLog(small_disk / "log.jsonl", keep_until_step=-1)
    (small_disk / "other").write_bytes(bytes(2**22 - 2**13))
    for row in whole:
        log.write(row)
    assert 0 < len(read_rows(small_disk / "log.jsonl")) < 10
    with pytest.raises(OSError, match="No space left"):
        log.sync()
    (small_disk / "other").unlink()
    log.sync()
    assert read_rows(small_disk / "log.jsonl") == whole
    log.close()
    (small_disk / "log.jsonl").unlink()


def test_a_full_disk_is_an_alarm_and_another_try(launched: Path, small_disk: Path) -> None:
    """See tests/saving_cases.py."""
    alarms = read_rows(small_disk / "full" / "alarms.jsonl")
    assert [(row["step"], row["about"]) for row in alarms] == [(5, "checkpoint"), (6, "checkpoint")]
    assert "has 1.2 MiB free, and a checkpoint takes 1." in alarms[0]["reason"]
    assert alarms[0]["reason"].endswith("the next try is after step 6")
    said = (launched / "said").read_text()
    assert "error: there is no room for " in said
    assert "(No space left on device); make some, and give the same command again." in said
    assert "Traceback" not in said
    said = (small_disk / "full" / "console.log").read_text()
    assert "ALARM: no checkpoint after step 5: " in said
    with pytest.raises(OSError, match="No space left"):
        write_shares(small_disk, [Share({"weight": torch.zeros(2**20)}, [])], process=0)


def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path: Path) -> None:
    """What is unfinished makes room first."""
    unfinished = tmp_path / "checkpoints" / "step_00000005"
    unfinished.mkdir(parents=True)
    with pytest.raises(OSError, match=r"MiB free, and a checkpoint takes 953,674,317\.4"):
        make_room(tmp_path / "checkpoints" / "step_00000010", num_bytes=10**15)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_two_processes_know_together_of_what_fails_and_what_is_damaged(launched: Path) -> None:
    """See tests/saving_cases.py; the logs are in the end those of an undisturbed run."""
    limited, whole = launched / "limited", launched / "whole"
    said = (launched / "said").read_text()
    assert "error: no checkpoint of step 8 could be written ([Errno 27] File" in said
    assert said.count("starting ") == 3
    alarms = read_rows(limited / "alarms.jsonl")
    assert [row["step"] for row in alarms] == [5, 6, 7, 8, 8, 8, 5]
    assert all("large (process 1); " in row["reason"] for row in alarms[:6])
    damaged = limited / "checkpoints" / "step_00000008"
    reason = f"{damaged} is damaged (states_00001.pt has another checksum): going on from "
    assert alarms[6]["reason"] == f"{reason}step_00000005"
    assert f"continuing {limited} after step 5 of 8" in said
    for name in ("losses.jsonl", "evals.jsonl", "quarantine.jsonl"):
        assert runs.rows(limited / name) == runs.rows(whole / name), name
    assert [step_of(path) for path in complete(limited)] == [5, 8]
    assert not list(limited.glob(f"checkpoints/*/{SET_ASIDE}"))
    starts = json.loads((limited / rundir.MANIFEST).read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 0, 5]
