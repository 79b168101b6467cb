"""Text of every form: whole documents, in order, once each, however the input is cut."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from webdataset.writer import TarWriter

from data.compression import DamagedError
from data.prepare.convert import rows, streams
from data.prepare.convert.left_out import LeftOut, Unusable
from data.prepare.convert.texts import split_lines
from nmm.config import Kind
from tests.converting import check_reported, read, refused, run, samples, write_lines

WHOLE = ("--held-out-fraction", 0)


def texts(out: Path) -> list[str]:
    return [str(text) for (text,) in read(Kind.text, out)]


def test_text_files_are_documents_without_mark_and_carriage_returns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfIt was\r\na  cat.\r\n\r\nEnd\r\n")
    (tmp_path / "b.txt").write_bytes(b"   \n")
    (tmp_path / "c.txt").write_bytes("é 😀".encode())
    (tmp_path / "d.txt").write_bytes(b"good line\ncaf\xe9\n" * 50)
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"zipped\n"))
    (tmp_path / "f.txt.zst").write_bytes(zstandard.compress(b"packed"))
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress(b"cut off")[:-3])
    (tmp_path / "h.txt").write_bytes("utf-16".encode("utf-16-le"))
    expected = ["It was\na  cat.\n\nEnd", "é 😀", "zipped", "packed"]
    reasons = (
        "1 no text in the file",
        "1 not UTF-8",
        "1 compressed file that is cut or damaged",
        "1 NUL in the text",
    )
    for name, flags in (("whole", ()), ("pieces", ("--document-characters", 1000))):
        run("text", "--input", tmp_path / "*.*", "--out", tmp_path / name, *WHOLE, *flags)
        assert texts(tmp_path / name) == expected
        check_reported(capsys.readouterr().out, *reasons)


def test_rows_of_lines_and_parquet_and_members_of_tars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"row {i}", "id": i} for i in range(9)])
    lines = source.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:50]) + gzip.compress(lines[50:]))
    (tmp_path / "c.json.zst").write_bytes(zstandard.compress(lines))
    values = pyarrow.array([*(b"row %d" % i for i in range(9)), b"caf\xe9"])
    table = pyarrow.table({"text": values.view(pyarrow.string())})
    parquet.write_table(table, tmp_path / "d.parquet")
    with TarWriter(str(tmp_path / "e.tar"), encoder=False) as tar:
        for i in range(9):
            packed = gzip.compress(b"row %d" % i)
            tar.write(
                {"__key__": str(i), **({"txt.gz": packed} if i % 2 else {"txt": b"row %d" % i})}
            )
        tar.write({"__key__": "other", "ten": b"tensor"})
    (tmp_path / "f.jsonl.zst").write_bytes(zstandard.compress(lines)[:-5])
    run("text", "--input", tmp_path / "*", "--out", tmp_path / "out", *WHOLE)
    assert texts(tmp_path / "out")[:45] == [f"row {i}" for i in range(9)] * 5
    check_reported(
        capsys.readouterr().out,
        "1 no text",
        "1 not UTF-8",
        "1 compressed file that is cut or damaged, from here on",
    )


def test_every_line_is_read_once_wherever_the_file_is_cut(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [{"text": "x" * draw.choice([0, 1, 9, 500]), "id": i} for i in range(300)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    for documents in (1, 2, 7, 50, 1000):
        found, bounds = [], []
        for piece in rows.line_pieces(path, documents_per_task=documents):
            bounds.append((piece.start, piece.stop))
            found += [row.values for row in rows.read_lines(piece, left_out=LeftOut())]
        assert found == lines
        assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
        assert (bounds[0][0], bounds[-1][1]) == (0, path.stat().st_size)
    assert len(bounds) == 1


def test_places_are_lines_or_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"text": "words " * 20}).encode()
    path = write_lines(tmp_path / "a.jsonl", [good, b"bad", *[good] * 40, b"bad", good])
    run("text", "--input", path, "--out", tmp_path / "out", "--documents-per-task", 25)
    said = capsys.readouterr().out
    start = path.read_bytes().rindex(b"bad")
    assert f"       2  not JSON\n{'':14}{path}:2\n{'':14}{path}:byte {start}\n" in said
    assert len({key[:6] for key in samples(tmp_path / "out")}) == 2


@pytest.mark.parametrize("pack", [zstandard.compress, gzip.compress])
def test_packed_files_are_told_by_their_bytes_and_a_cut_one_is_no_end(
    pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(300_000) + bytes(5_000_000)
    whole = b"".join(pack(part) for part in (data[:9], b"", data[9:]))
    (tmp_path / "a").write_bytes(whole)
    with streams.opened(tmp_path / "a") as file:
        assert file.read() == data
    (tmp_path / "a").write_bytes(whole[:-1])
    with streams.opened(tmp_path / "a") as file, pytest.raises(DamagedError):
        file.read()


def test_gzip_members_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(bytes(5000))
    assert streams.gunzip(packed) == bytes(5000)
    with pytest.raises(Unusable, match="broken"):
        streams.gunzip(packed[:-4])
    monkeypatch.setattr(streams, "MAX_BYTES", 4999)
    with pytest.raises(Unusable, match="more than"):
        streams.gunzip(packed)


def test_lines_without_end_are_no_documents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"one\n" + b"x" * 50 + b"\n" + b"y" * 9 + b"\nlast")
    monkeypatch.setattr(streams, "MAX_BYTES", 10)
    with streams.opened(tmp_path / "a") as file:
        assert list(streams.lines(file)) == [b"one\n", None, b"y" * 9 + b"\n", b"last"]


def test_split_lines_loses_no_word_and_ends_at_blank_lines() -> None:
    paragraphs = [" ".join(f"w{i}x{j}" for j in range(i % 30 + 1)) for i in range(200)]
    pieces = list(split_lines("\n\n".join(paragraphs).split("\n"), characters=400))
    assert [p for piece in pieces for p in piece.split("\n\n")] == paragraphs
    assert all(400 <= len(piece) + 2 < 800 for piece in pieces[:-1])
    lines = [f"line {index}" for index in range(1000)]
    pieces = list(split_lines(lines, characters=100))
    assert "\n".join(pieces).split("\n") == lines
    assert max(map(len, pieces)) < 220


def test_what_holds_no_text_is_refused_with_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for i in range(3):
            tar.write({"__key__": str(i), "mp": b"packed"})
    message = refused(capsys, "text", "--input", tmp_path / "a.tar", "--out", tmp_path / "out")
    assert "holds no document that can be used" in message
    assert "a.tar:0 (has .mp)" in message
    assert not list((tmp_path / "out").iterdir())
