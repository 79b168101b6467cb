"""Captions of every form: each image keeps its texts; what cannot be used is counted by reason."""

import base64
import csv
import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from webdataset.writer import TarWriter

from data.prepare.findings import DEFECTS
from nmm.config import Kind
from tests.converting import check_reported, picture, read, refused, run, samples, write_lines

WHOLE = ("--held-out-fraction", 0)
SVG = b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """60 captions of 20 texts, and one line for every way to be unusable."""
    (tmp_path / "images").mkdir()
    for index in range(60):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(picture(index))
    (tmp_path / "images" / "page.jpg").write_bytes(b"<html>not found</html>")
    (tmp_path / "images" / "empty.jpg").write_bytes(b"")
    (tmp_path / "images" / "zero").symlink_to("/dev/zero")
    outside = tmp_path.with_name(f"{tmp_path.name}.jpg")
    outside.write_bytes(picture(0))
    rows: list = [{"image": f"images/{i}.jpg", "caption": f"Text {i % 20}."} for i in range(60)]
    rows[0] = b"\xef\xbb\xbf" + json.dumps(rows[0]).encode()
    rows += [
        {"image": "images/0.jpg", "caption": " ", "alt": "from alt\r\nin two lines"},
        {"image": "images/none.jpg", "caption": "dangling"},
        {"image": "images", "caption": "a folder"},
        {"image": "images/zero", "caption": "without end"},
        {"image": f"{outside}", "caption": "no business of theirs"},
        {"image": f"images/../../{outside.name}", "caption": "nor this way"},
        {"image": "images/page.jpg", "caption": "a web page"},
        {"image": "images/empty.jpg", "caption": "nothing"},
        {"image": "https://example.org/1.jpg", "caption": "on the web"},
        {"image": None, "caption": "no path"},
        {"image": "images/0.jpg", "caption": None},
        {"image": "images/0.jpg", "caption": ["Text 0.", "another"]},
        {"image": "images/0.jpg", "caption": {"a": "dict"}},
        {"image": "images/0.jpg", "caption": "half \ud800"},
        {"image": "images/0.jpg", "caption": "nul \0"},
        b'{"image": "images/0.jpg", "caption": "latin \xe9"}',
        b'{"image": "cut off',
        b"[1, 2]",
        b"",
    ]
    return write_lines(tmp_path / "captions.jsonl", rows)


def test_captions_arrive_whole_on_two_disjoint_sides(
    captions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = captions.parent / "out"
    run("captions-jsonl", "--input", captions, "--out", out, "--fallback-field", "alt",
        "--held-out-fraction", 0.3, "--documents-per-shard", 7)  # fmt: skip
    train, held_out = read(Kind.caption, out), read(Kind.caption, out, "held_out")
    expected = [(picture(index), f"Text {index % 20}.") for index in range(60)]
    expected += [(picture(0), "from alt\nin two lines"), (picture(0), "Text 0.")]
    assert Counter((image, text) for image, text in train + held_out) == Counter(expected)
    assert not {text for _, text in train} & {text for _, text in held_out}
    assert len(held_out) > 3
    assert len(list(out.glob("train-*.tar"))) == -(-len(train) // 7)
    said = capsys.readouterr().out
    check_reported(
        said,
        "1 no caption, took alt",
        "1 several captions, took the first",
        "3 image that cannot be read",
        "1 image that is not JPEG, PNG, WebP or GIF",
        "1 image of 0 bytes",
        "1 image given by a URL, never fetched",
        "2 image outside of --image-root",
        "1 no image in image",
        "2 no text in caption",
        "1 half a surrogate pair in the text",
        "1 NUL in the text",
        "1 not UTF-8",
        "1 not JSON",
        "1 not a JSON object",
    )
    assert f"image that cannot be read\n{'':14}{captions}:62\n" in said


def rows_in_every_shape(folder: Path) -> list[dict]:
    """The same picture in every way that a row can hold one."""
    (folder / "one.png").write_bytes(picture(1, "PNG"))
    encoded = base64.b64encode(picture(1, "PNG")).decode()
    shapes: list = [
        picture(1, "PNG"),
        {"bytes": picture(1, "PNG"), "path": None},
        {"bytes": None, "path": "one.png"},
        encoded,
        f"data:image/png;base64,{encoded}",
        "one.png",
    ]
    return [{"image": shape, "caption": f"shape {i}"} for i, shape in enumerate(shapes)]


def test_images_are_bytes_structs_base64_or_paths(tmp_path: Path) -> None:
    rows = rows_in_every_shape(tmp_path)
    expected = [[picture(1, "PNG"), f"shape {i}"] for i in range(len(rows))]
    for number, some in enumerate((rows[:1], rows[1:3], rows[3:])):
        table = pyarrow.Table.from_pylist(some)
        parquet.write_table(table, tmp_path / f"{number}.parquet")
    run("captions-parquet", "--input", tmp_path / "*.parquet", "--out", tmp_path / "p", *WHOLE)
    assert read(Kind.caption, tmp_path / "p") == expected
    source = write_lines(tmp_path / "rows.jsonl", rows[3:])
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    run("captions-jsonl", "--input", tmp_path / "rows.jsonl.gz", "--out", tmp_path / "j", *WHOLE)
    assert read(Kind.caption, tmp_path / "j") == expected[3:]


def test_row_groups_are_cut_into_tasks_and_a_wrong_column_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": picture(i), "text": f"row {i}", "url": "u"} for i in range(60)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    arguments = ("captions-parquet", "--input", tmp_path / "a.parquet", "--out", tmp_path / "out")
    assert "without a column caption; it has image, text, url" in refused(capsys, *arguments)
    run(*arguments, *WHOLE, "--text-field", "text", "--documents-per-task", 20)
    assert read(Kind.caption, tmp_path / "out") == [[row["image"], row["text"]] for row in rows]
    tasks = Counter(key.split("-")[0] for key in samples(tmp_path / "out"))
    assert list(tasks.values()) == [14, 14, 14, 18]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be read as parquet" in refused(capsys, *arguments, "--name", "b", *WHOLE)


def test_damaged_parquet_loses_the_rest_of_a_row_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"row {i} " + "x" * 99} for i in range(30)]
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=10)
    page = parquet.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = page.dictionary_page_offset or page.data_page_offset
    data[start : start + 40] = bytes(40)
    file.write_bytes(data)
    run("text", "--input", file, "--out", tmp_path / "out", *WHOLE)
    texts = [text for (text,) in read(Kind.text, tmp_path / "out")]
    assert texts == [row["text"] for row in (*rows[:10], *rows[20:])]
    check_reported(
        capsys.readouterr().out, "1 parquet that is damaged, to the end of the row group"
    )


def test_all_captions_of_a_list_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"image": picture(1), "captions": ["a cat", "one cat\r\nsits"]},
        {"image": picture(2), "captions": ["a dog", None, " "]},
        {"image": picture(3), "captions": []},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    run("captions-parquet", "--input", tmp_path / "a.parquet", "--out", tmp_path / "out", *WHOLE,
        "--text-field", "captions")  # fmt: skip
    assert read(Kind.caption, tmp_path / "out", text_field="caption") == [
        [picture(1), "a cat"],
        [picture(1), "one cat\nsits"],
        [picture(2), "a dog"],
    ]
    said = capsys.readouterr().out
    assert "3  documents in" in said
    assert "the text field caption" in said
    check_reported(
        said, "2 no text in captions: left out of a list of captions", "1 no text in captions"
    )


def img2dataset(path: Path) -> Path:
    """A shard as img2dataset writes it, with what it has been seen to hold."""
    with TarWriter(str(path), encoder=False) as shard:
        for i, status in enumerate(("success", "success", "failed_to_download", "success")):
            key = f"{i:09d}"
            fields = {"key": key, "caption": f"json {i}", "status": status, "url": "http://x"}
            if i == 3:
                fields["caption"] = None
            sample = {"jpg": picture(i), "txt": f"txt {i}".encode()}
            shard.write({"__key__": key, **sample, "json": json.dumps(fields).encode()})
        shard.write({"__key__": "upper", "PNG": picture(5, "PNG"), "txt": b"\xef\xbb\xbfupper"})
        shard.write(
            {"__key__": "zipped", "webp": picture(6, "WEBP"), "txt.gz": gzip.compress(b"z")}
        )
        shard.write({"__key__": "broken", "jpg": picture(7), "txt.gz": b"\x1f\x8b broken"})
        shard.write({"__key__": "alone", "txt": b"no image"})
        shard.write({"__key__": "two", "jpg": picture(8), "png": picture(8, "PNG"), "txt": b"two"})
        shard.write({"__key__": "class", "png": picture(9, "PNG"), "cls": b"7"})
        shard.write({"__key__": "latin", "png": picture(9, "PNG"), "txt": b"\xe9"})
        shard.write({"__key__": "svg", "png": SVG, "txt": b"a drawing"})
    path.with_suffix(".parquet").write_bytes(b"statistics")
    path.with_name(path.stem + "_stats.json").write_text("{}")
    return path


def test_img2dataset_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    img2dataset(tmp_path / "00000.tar")
    run("captions-tar", "--input", tmp_path / "00000*", "--out", tmp_path / "out", *WHOLE)
    texts = [[picture(i), f"txt {i}"] for i in (0, 1, 3)]
    others = [[picture(5, "PNG"), "upper"], [picture(6, "WEBP"), "z"]]
    assert read(Kind.caption, tmp_path / "out") == texts + others
    check_reported(
        capsys.readouterr().out,
        "1 download that failed (`status` in .json)",
        "1 broken gzip",
        "1 no image",
        "1 several images",
        "1 no text in .txt",
        "1 not UTF-8",
        "1 SVG image",
    )
    run("captions-tar", "--input", tmp_path / "00000.tar", "--out", tmp_path / "json", *WHOLE,
        "--text-field", "caption", "--fallback-field", "key")  # fmt: skip
    found = [text for _, text in read(Kind.caption, tmp_path / "json")]
    assert found == ["json 0", "json 1", "000000003"]
    run("captions-tar", "--input", tmp_path / "00000.tar", "--out", tmp_path / "cls", *WHOLE,
        "--text-extension", "cls")  # fmt: skip
    assert read(Kind.caption, tmp_path / "cls") == [[picture(9, "PNG"), "7"]]


def test_tars_may_be_packed_and_damaged_ones_give_what_they_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as shard:
        for i in range(20):
            for extension, data in (("jpg", picture(i)), ("txt", b"%d" % i)):
                member = tarfile.TarInfo(f"a.b/{i}.{extension}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    data = whole.getvalue()
    files = {
        "a.tar.gz": gzip.compress(data),
        "b.tar.zst": zstandard.compress(data[:8192]) + zstandard.compress(data[8192:]),
        "c.tar": data[: 7 * 2560 + 600],
        "c2.tar": data[: 5 * 2560],
        "d.tar": b"",
        "e.tar": b"<html>not found</html>" * 100,
        "f.tgz": gzip.compress(data)[:-9],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    run("captions-tar", "--input", tmp_path / "*.t*", "--out", tmp_path / "out", *WHOLE)
    found = [int(str(text)) for _, text in read(Kind.caption, tmp_path / "out")]
    assert found[:40] == [*range(20), *range(20)]
    assert found[40:] == [*range(7), *range(5), *range(20)]
    check_reported(
        capsys.readouterr().out,
        "1 compressed file that is cut or damaged",
        *(f"1 {DEFECTS[reason]}" for reason in ("cut_short", "no_end_blocks", "truncated")),
        "2 file that is no tar",
    )
    assert not list(tmp_path.rglob("unpacked.tar"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """photos/{cat,t-shirt}/*.jpg with texts beside most of them."""
    for name in ("cat", "t-shirt"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "photos" / name / f"{i}.JPG").write_bytes(picture(i))
    photos = tmp_path / "photos"
    for i in range(2):
        (photos / "cat" / f"{i}.txt").write_text(f"cat {i}\n")
    (photos / "cat" / "2.txt").write_text(" ")
    (photos / "cat" / "._0.jpg").write_bytes(b"of a Mac")
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "0.jpg").write_bytes(picture(0))
    (photos / "cat" / "around").symlink_to(photos)
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    (photos.parent / "dog").mkdir()
    (photos.parent / "dog" / "5.jpg").write_bytes(picture(5))
    (photos / "linked").symlink_to(photos.parent / "dog")
    (photos / "linked" / "6.mpo").write_bytes(picture(6, "MPO"))
    (photos / "drawing.svg").write_bytes(SVG)
    (photos / "scan.tif").write_bytes(b"II*\0")
    return photos


def test_folders_with_texts_beside_or_as_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out"
    run("captions-folder", "--input", folder, "--out", out, *WHOLE)
    assert read(Kind.caption, out) == [[picture(i), f"cat {i}"] for i in range(2)]
    unread = (
        "1 SVG image",
        "1 image that is not JPEG, PNG, WebP or GIF",
        "1 file that cannot be read",
    )
    check_reported(
        capsys.readouterr().out, "1 no text in the .txt", "5 no .txt beside the image", *unread
    )
    out = folder.parent / "names"
    run("captions-folder", "--input", folder, "--text", "folder-name", "--out", out, *WHOLE)
    expected = [[picture(i), name] for name in ("cat", "t-shirt") for i in range(3)]
    linked = [[picture(5), "dog"], [picture(6, "MPO"), "dog"]]
    assert read(Kind.caption, out) == [*expected[:3], *linked, *expected[3:]]
    check_reported(capsys.readouterr().out, *unread)


def test_folders_with_metadata(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file_name": f"cat/{i}.JPG", "text": f"a cat\n{i}, sits"} for i in range(3)]
    write_lines(folder / "metadata.jsonl", [*rows, {"file_name": "none.jpg", "text": "gone"}])
    with (folder / "t-shirt" / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows([[f"{i}.JPG", f'a "shirt"\n{i}, white'] for i in range(3)])
    out = folder.parent / "out"
    run("captions-folder", "--input", folder, "--text", "metadata", "--out", out, *WHOLE)
    cats = [[picture(i), f"a cat\n{i}, sits"] for i in range(3)]
    shirts = [[picture(i), f'a "shirt"\n{i}, white'] for i in range(3)]
    assert read(Kind.caption, out) == cats + shirts
    check_reported(capsys.readouterr().out, "1 image that cannot be read")
