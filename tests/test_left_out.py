"""The quarantine of the index tool lists every sample that is left out, and shards without one."""

import json
from pathlib import Path

import pytest

from data.prepare import index as command
from tests import corpora
from tests.corpora import write_tar
from tests.test_index import DAMAGED, pair

FLAGS = ["--kind", "caption", "--tokenizer", str(corpora.tokenizer_path())]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_everything_that_is_left_out_is_listed(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of shards that are indexed now or were before; as many lines as the table counts."""
    for number, members in enumerate(DAMAGED.values()):
        write_tar(tmp_path / f"x-{number:03d}.tar", [*members, *pair("good\nkey")])
    listed = tmp_path / "folder" / "left-out.jsonl"
    flags = [*FLAGS, "--shards", f"{tmp_path}/x-*.tar", "--workers", workers]
    expected = [
        {"shard": f"{tmp_path}/x-{number:03d}.tar", "key": "a", "reason": reason, "detail": ""}
        for number, reason in enumerate(DAMAGED)
    ]
    for _ in range(2):
        command.main([*flags, "--quarantine", str(listed)])
        assert rows(listed) == expected
        lines = capsys.readouterr().out.splitlines()
        assert f"dropped{len(expected):>31}" in lines
        table = {line.split()[0]: line.split()[1] for line in lines if "first: a" in line}
        assert table == dict.fromkeys(DAMAGED, "1")


def test_one_bad_shard_stops_no_other(tmp_path: Path) -> None:
    """It is listed and named at the end; the others have their index."""
    for number in range(4):
        write_tar(tmp_path / f"x-{number}.tar", [*pair("a"), ("b.jpg", b"")])
    (tmp_path / "x-1.tar").write_bytes(b"<html>" * 200)
    (tmp_path / "x-2.tar").write_bytes(b"")
    listed = tmp_path / "left-out.jsonl"
    flags = [*FLAGS, "--shards", f"{tmp_path}/x-*.tar", "--workers", "1"]
    with pytest.raises(SystemExit, match=r"x-1\.tar is not a tar .*\(2 of 4 shards cannot be"):
        command.main([*flags, "--quarantine", str(listed)])
    told = [(Path(row["shard"]).name, row["key"], row["reason"]) for row in rows(listed)]
    assert told == [
        ("x-0.tar", "b", "missing_text"),
        ("x-1.tar", "", "no_index"),
        ("x-2.tar", "", "no_index"),
        ("x-3.tar", "b", "missing_text"),
    ]
    assert "is empty (0 bytes)" in rows(listed)[2]["detail"]
    assert sorted(path.name for path in tmp_path.glob("*.index")) == [
        "x-0.tar.index",
        "x-3.tar.index",
    ]
    with pytest.raises(SystemExit, match=r"--quarantine is .*x-0\.tar/y, which cannot be written"):
        command.main([*flags, "--quarantine", str(tmp_path / "x-0.tar" / "y")])
