"""The converter: nothing lost, splits disjoint, the same bytes however often it was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.prepare import alone
from data.prepare.convert import command, workspace
from data.prepare.convert.run import _do_tasks
from nmm.config import Kind
from tests.converting import picture, read, refused, run, samples, write_lines

DOCUMENTS, TASKS = 12_000, 48
STOPPED = "stopped; the same command continues from the tasks that are done.\n"
FLAGS = ("--documents-per-shard", 100, "--documents-per-task", DOCUMENTS // TASKS)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def receipts(out: Path) -> set[str]:
    return {path.parent.name for path in out.glob(".convert/*/receipt.json")}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of the same length, so that tasks are alike, with some unusable lines."""
    rows: list = [{"text": f"document {i:06d} " + "word " * 40} for i in range(DOCUMENTS)]
    for number in range(0, DOCUMENTS, 1000):
        rows[number] = {"text": " " * 215}
    return write_lines(tmp_path_factory.mktemp("lines") / "a.jsonl", rows)


@pytest.fixture(scope="module")
def undisturbed(lines: Path) -> Path:
    out = lines.parent / "undisturbed"
    run("text", "--input", lines, "--out", out, *FLAGS)
    return out


def begin(lines: Path, out: Path) -> subprocess.Popen[str]:
    """The command in another process, with two workers."""
    arguments = ("text", "--input", lines, "--out", out, *FLAGS, "--workers", 2)
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from data.prepare.convert.__main__ import main; main(sys.argv[1:])"
    asked = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(asked, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_receipts(process: subprocess.Popen[str], out: Path, *, number: int) -> None:
    until = time.monotonic() + 60
    while len(receipts(out)) < number:
        assert process.poll() is None, f"too late to kill it: {process.communicate()}"
        assert time.monotonic() < until
        time.sleep(0.005)


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_three_times_and_continued_equals_undisturbed(
    lines: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A worker is killed, then all are interrupted as by Ctrl-C, then the command is killed."""
    done: dict[str, int] = {}
    for code in (1, 130, -9):
        process = begin(lines, tmp_path)
        wait_for_receipts(process, tmp_path, number=len(done) + 2)
        workers = children(process.pid)
        assert len(workers) == 2
        if code == 130:
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(workers[0] if code == 1 else process.pid, signal.SIGKILL)
        said = process.communicate(timeout=30)[1]
        assert process.returncode == code
        assert all((tmp_path / ".convert" / task / "receipt.json").exists() for task in done)
        for task, inode in done.items():
            assert (tmp_path / ".convert" / task / "train-000000.tar").stat().st_ino == inode
        for task in receipts(tmp_path):
            done[task] = (tmp_path / ".convert" / task / "train-000000.tar").stat().st_ino
        if code == 1:
            assert said.startswith("error: a worker was killed by SIGKILL in task ")
        elif code == 130:
            assert said == STOPPED
        assert code == -9 or not any(map(is_alive, workers))
    assert 6 <= len(done) < TASKS
    run("text", "--input", lines, "--out", tmp_path, *FLAGS)
    assert not any(map(is_alive, workers))
    assert contents(tmp_path) == contents(undisturbed)
    final = {path.stat().st_ino for path in tmp_path.iterdir()}
    assert set(done.values()) <= final


def test_nothing_is_lost_and_shards_and_keys_follow_the_input(
    lines: Path, undisturbed: Path
) -> None:
    train, held_out = samples(undisturbed), samples(undisturbed, "held_out")
    assert not train.keys() & held_out.keys()
    assert len(train) + len(held_out) == DOCUMENTS - 12
    assert 0.03 < len(held_out) / DOCUMENTS < 0.07
    texts = [members["txt"] for _, members in sorted({**train, **held_out}.items())]
    assert texts == sorted(set(texts))
    for found in (train, held_out):
        assert list(found) == sorted(found)
    for split in ("train", "held_out"):
        names = sorted(path.name for path in undisturbed.glob(f"{split}-*.tar"))
        assert names == [f"{split}-{number:06d}.tar" for number in range(len(names))]


def test_killed_between_the_last_moves(lines: Path, undisturbed: Path, tmp_path: Path) -> None:
    arguments = ["text", "--input", str(lines), "--out", str(tmp_path), *map(str, FLAGS)]
    reading, writing, _ = command.parse(arguments)
    with workspace.opened(reading, writing) as space:
        _do_tasks(
            space, reading, writing, workers=1, progress=lambda tasks, done: lambda more: None
        )
        moves = json.loads((space.root / "moves.json").read_text())["moves"]
        for source, target in moves[:5]:
            (tmp_path / source).rename(tmp_path / target)
    run("text", "--input", lines, "--out", tmp_path, *FLAGS)
    assert contents(tmp_path) == contents(undisturbed)


def test_another_command_or_process_is_refused_and_other_input_is_read_again(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(lines.read_bytes())
    process = begin(source, out)
    wait_for_receipts(process, out, number=2)
    monkeypatch.setattr(alone, "WAIT_SECONDS", 0.1)
    arguments = ("text", "--input", source, "--out", out)
    assert "where another process converts" in refused(capsys, *arguments, *FLAGS)
    monkeypatch.undo()
    process.terminate()
    assert process.communicate(timeout=30)[1] == STOPPED
    assert process.returncode == 130
    message = refused(capsys, *arguments, *FLAGS, "--text-field", "body")
    assert "was begun with --text-field text, and now it is body" in message
    assert "--documents-per-shard 100, and now it is 1000" in refused(capsys, *arguments)
    source.write_bytes(source.read_bytes()[:100_000])
    run(*arguments, *FLAGS)
    run("text", "--input", source, "--out", tmp_path / "fresh", *FLAGS)
    assert contents(out) == contents(tmp_path / "fresh")


def test_existing_shards_are_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(60)])
    out = tmp_path / "out"
    run("text", "--input", source, "--out", out, "--held-out-fraction", 0.3)
    before = contents(out)
    assert set(before) == {"train-000000.tar", "held_out-000000.tar"}
    message = refused(capsys, "text", "--input", source, "--out", out)
    assert "held_out-000000.tar exists" in message
    run("text", "--input", source, "--out", out, "--name", "more", "--held-out-fraction", 0)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert len(read(Kind.text, out, "more")) == 60


def test_a_wrong_image_root_stops_early_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequence = [{"type": "text", "text": "t"}, {"type": "image", "file": "none.jpg"}]
    source = write_lines(tmp_path / "a.jsonl", [{"sequence": sequence}] * 500)
    out = tmp_path / "out"
    message = refused(capsys, "interleaved-jsonl", "--input", source, "--out", out)
    assert "100 images in a row" in message
    assert "a.jsonl:100" in message
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("text", "--input", "no/*.txt"), "--input is no/*.txt, which names no file"),
        (("text", "--input", "data"), "or a quoted glob such as 'data/**/*'"),
        (("text", "--input", "{empty}"), "--input holds no document"),
        (
            ("text", "--input", "{empty}", "--documents-per-shard", "0"),
            "--documents-per-shard is 0",
        ),
        (("text", "--input", "{empty}", "--held-out-fraction", "5"), "--held-out-fraction is 5.0"),
        (("text", "--input", "{empty}", "--name", "held_out"), "--name is held_out"),
        (("text", "--input", "{empty}", "--name", "a/b"), "--name is 'a/b'"),
        (("text", "--input", "{empty}", "--document-characters", "-1"), "characters is -1"),
        (("captions-jsonl", "--input", "{empty}"), "no document"),
        (("captions-jsonl", "--input", "{empty}", "--image-root", "no"), "--image-root is no"),
        (("captions-parquet", "--input", "{empty}"), "cannot be read as parquet"),
        (("captions-folder", "--input", "{empty}"), "which is no folder"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    filled = [argument.format(empty=empty) for argument in arguments]
    message = refused(capsys, *filled, "--out", tmp_path / "out")
    assert part in message
    assert not list(tmp_path.rglob("*.tar*"))


def test_the_example_of_the_documentation_writes_readable_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path("docs/data-format.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_bytes(picture(1))
    subprocess.run([sys.executable, "-c", example], check=True)
    assert read(Kind.caption, tmp_path, "caption") == [[picture(1), "A cat sleeps."]]
    assert read(Kind.interleaved, tmp_path, "interleaved") == [["A cat:", picture(1), "It sleeps."]]
    assert read(Kind.text, tmp_path, "text") == [["The cat slept until noon."]]
