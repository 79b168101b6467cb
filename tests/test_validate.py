"""Every malformed shape is found and named as what it is; the counts add up; nothing else is."""

import gzip
import io
import json
import tarfile
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import tar
from data.indexing import index_shard
from data.prepare import validate as command
from data.prepare.defects import ShardReport, repeated
from data.prepare.findings import DEFECTS, NOTES
from data.prepare.validate import Report, validate
from data.tokenizer import Tokenizer
from nmm.config import Kind, Layout
from tests import corpora
from tests.test_images import bomb, endless_scans

RNG = np.random.default_rng(0)
TEXT = b"a red circle."


def photo(*, form: str = "JPEG", side: int = 64) -> bytes:
    """Noise, so that half of the file is half of the picture."""
    buffer = BytesIO()
    pixels = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


PICTURE, BOMB = photo(), bomb(100_000, 100_000)
Member = tuple[str | bytes, bytes | tarfile.TarInfo]


def pair(key: str, *, image: bytes = PICTURE, text: bytes = TEXT) -> list[Member]:
    return [(f"{key}.jpg", image), (f"{key}.txt", text)]


def archive(members: list[Member], *, form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as shard:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo()
            info.name = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
            content = data if isinstance(data, bytes) else b""
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def entry(kind: bytes, *, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


GOOD = pair("g")
SIX = [member for number in range(6) for member in pair(f"{number:06d}")]
WHOLE = archive(SIX)
END = 6 * (2 * 512 + -(-len(PICTURE) // 512) * 512 + 512)  # header, image, header, text
CAPTIONS = {
    "empty": b"",
    "blank": b" \n\t",
    "latin1": "über".encode("latin-1"),
    "utf16": "a cat".encode("utf-16"),
    "utf16be": "a cat".encode("utf-16-be"),
    "special": b"<s> </s> <unk>",
    "long": b"word " * 40_000,
}
PICTURES = {
    "none": b"",
    "half": PICTURE[: len(PICTURE) // 2],
    "page": b"<html>",
    "head": PICTURE[:64],
}
ANY = Counter[tuple[str, str]]

# What lies in a shard, and the (reason, key) of everything that is to be found.
SHAPES: dict[str, tuple[bytes, list[tuple[str, str]]]] = {
    "0 control": (WHOLE, []),
    "1 zero bytes": (b"", [("empty_file", "")]),
    "2 cut inside a member": (
        WHOLE[: END // 2 + 1000],
        [("cut_short", ""), ("truncated", "000003")],
    ),
    "3 no end blocks": (WHOLE[:END], [("no_end_blocks", "")]),
    "3 one end block": (WHOLE[: END + 512], [("no_end_blocks", "")]),
    "4 gzip": (gzip.compress(WHOLE), [("compressed", "")]),
    "5 a page": (b"<!DOCTYPE html><p>503</p>" * 40, [("not_a_tar", "")]),
    "6 no caption": (archive([("a.jpg", PICTURE), *GOOD]), [("missing_text", "a")]),
    "7 no image": (archive([("a.txt", TEXT), *GOOD]), [("missing_image", "a")]),
    "8 same name twice": (
        archive([*pair("a"), ("a.jpg", PICTURE), *GOOD]),
        [("duplicate_member", "a")],
    ),
    "9 not adjacent": (
        archive([("a.jpg", PICTURE), ("b.jpg", PICTURE), ("a.txt", TEXT), ("b.txt", TEXT), *GOOD]),
        [("not_adjacent", "a"), ("not_adjacent", "b")],
    ),
    "10 dot in the folder": (archive(pair("train.v1/0001")), []),
    "11 folder and Mac": (
        archive([("s", entry(tarfile.DIRTYPE)), ("s/._a.jpg", b"Mac"), *pair("s/a")]),
        [("directory", ""), ("hidden_file", "")],
    ),
    "12 other extensions": (
        archive([("a.input.jpg", PICTURE), ("a.cls", b"3")]),
        [("missing_image", "a"), ("no_document", "")],
    ),
    "13 captions": (
        archive([m for key, text in CAPTIONS.items() for m in pair(key, text=text)]),
        [
            ("empty_text", "empty"),
            ("empty_text", "blank"),
            ("not_utf8", "latin1"),
            ("not_utf8", "utf16"),
            ("nul_in_text", "utf16be"),
        ],
    ),
    "14 images": (
        archive([*(m for key, data in PICTURES.items() for m in pair(key, image=data)), *GOOD]),
        [
            ("image_header", "none"),
            ("image_decode", "half"),
            ("image_header", "page"),
            ("image_header", "head"),
        ],
    ),
    "15 name not UTF-8": (
        archive([(b"\xff\x92.jpg", PICTURE), (b"\xff\x92.txt", TEXT)]),
        [("odd_name", "\\udcff\\udc92")],
    ),
    "16 long names": (archive(pair("ü" * 200), form=tarfile.PAX_FORMAT), []),
    "17 line end in a name": (archive(pair("a\nb")), [("odd_name", "a\nb")]),
    "18 upper case": (
        archive([("a.JPG", PICTURE), ("a.TXT", TEXT), ("b.jpeg", PICTURE), ("b.txt", TEXT)]),
        [],
    ),
    "19 a link outside": (
        archive(
            [("a.jpg", entry(tarfile.SYMTYPE, target="../../etc/passwd")), ("a.txt", TEXT), *GOOD]
        ),
        [("link", ""), ("missing_image", "a")],
    ),
    "a name outside": (archive(pair("../../a")), [("odd_name", "../../a")]),
    "a pipe": (archive([("a", entry(tarfile.FIFOTYPE)), *GOOD]), [("special_file", "")]),
    "a broken header": (
        WHOLE[: END // 2] + b"x" * 512 + WHOLE[END // 2 + 512 :],
        [("unreadable_tail", "")],
    ),
    "two tars in one": (WHOLE + archive(GOOD), [("unreadable_tail", "")]),
    "two images": (archive([*pair("a"), ("a.png", PICTURE), *GOOD]), [("several_images", "a")]),
    "members nobody reads": (
        archive([*pair("a"), ("a.json", b"{}"), ("a.cls", b"1"), *pair("b"), ("b.json", b"{}")]),
        [("unread_member", ""), ("unread_member", "")],
    ),
    "a bomb": (
        archive([*pair("a", image=BOMB), *GOOD]),
        [("image_pixels", "a")],
    ),
    "scans without end": (
        archive([*pair("a", image=endless_scans(300)), *GOOD]),
        [("image_scans", "a")],
    ),
}


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def found(report: Report) -> Counter[tuple[str, str]]:
    return Counter((finding.reason, finding.key) for finding in report.findings)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_malformed_shape_is_named(shape: str, tmp_path: Path) -> None:
    data, expected = SHAPES[shape]
    report = validate([write(tmp_path, "x.tar", data)], layout=Layout(Kind.caption))
    assert found(report) == Counter(expected)
    bad = {key for reason, key in expected if key and reason in DEFECTS}
    assert report.sums["documents"] == report.sums["samples"] - len(bad)
    assert report.sums["bytes"] == len(data)


def test_the_index_drops_exactly_the_samples_with_defects(tmp_path: Path) -> None:
    """But for what only a full decode tells: the index reads the headers of images."""
    tokenizer = Tokenizer(corpora.tokenizer_path())
    compared = 0
    for shape, (data, _) in SHAPES.items():
        path = write(tmp_path, "x.tar", data)
        report = validate([path], layout=Layout(Kind.caption))
        if not report.sums["documents"]:
            continue
        dropped = {
            key
            for _, key in index_shard(
                path, layout=Layout(Kind.caption), tokenizer=tokenizer
            ).dropped
        }
        bad = {f.key for f in report.findings if f.is_defect and f.key}
        decoded = {f.key for f in report.findings if f.reason == "image_decode"}
        assert dropped - {key for key in dropped if key.startswith("byte ")} == bad - decoded, shape
        compared += 1
    assert compared > 20


def test_no_half_sample_where_members_are_not_adjacent(tmp_path: Path) -> None:
    """b has no text of its own, and must not get the text of a, which lies between its members."""
    members = [("a.jpg", PICTURE), ("b.jpg", PICTURE), ("a.txt", b"of a"), ("b.json", b"{}")]
    path = write(tmp_path, "x.tar", archive([*members, *GOOD]))
    faults = {sample.key: sample.fault for sample in tar.scan(path).samples}
    assert faults == {"a": "not_adjacent", "b": "not_adjacent", "g": ""}


STORY = {"texts": ["see", None, None, "end"], "images": [None, "0.jpg", "1.jpg", None]}
STORIES = {
    "good": ([], STORY, {"0.jpg": PICTURE, "1.jpg": PICTURE}),
    "two bad images": (
        ["image_header", "image_decode"],
        STORY,
        {"0.jpg": b"x", "1.jpg": PICTURE[: len(PICTURE) // 2]},
    ),
    "an image that is not there": (["skipped_image"], STORY, {"0.jpg": PICTURE}),
    "an image nobody names": (
        ["unread_member"],
        STORY,
        {"0.jpg": PICTURE, "1.jpg": PICTURE, "2.jpg": PICTURE},
    ),
    "lists that differ": (["bad_layout"], {"texts": ["a"], "images": []}, {}),
    "only images": (["empty_text"], {"texts": [None], "images": ["0.jpg"]}, {"0.jpg": PICTURE}),
}


@pytest.mark.parametrize("story", STORIES)
def test_every_image_of_a_story_is_judged(story: str, tmp_path: Path) -> None:
    expected, layout, images = STORIES[story]
    members: list[Member] = [("a.json", json.dumps(layout).encode())]
    members += [(f"a.{name}", data) for name, data in images.items()]
    good = [("g.json", json.dumps({"texts": ["x"], "images": [None]}).encode())]
    path = write(tmp_path, "x.tar", archive([*members, *good]))
    report = validate([path], layout=Layout(Kind.interleaved))
    assert Counter(finding.reason for finding in report.findings) == Counter(expected)
    assert report.sums["image_files"] == len(images)


def test_repeated_keys_and_missing_numbers(tmp_path: Path) -> None:
    shards = {
        "train-000000.tar": [*pair("a"), *pair("b")],
        "train-000001.tar": [*pair("a", text=b"another"), *pair("c")],
        "train-000004.tar": [*pair("b"), *pair("a", text=b"a third"), *pair("d")],
    }
    paths = [write(tmp_path, name, archive(members)) for name, members in shards.items()]
    report = validate(paths, layout=Layout(Kind.caption))
    names = [Path(finding.shard).name for finding in report.findings]
    told = [(finding.reason, finding.key) for finding in report.findings]
    assert list(zip(names, told, strict=True)) == [
        ("train-000004.tar", ("same_document", "b")),
        ("train-000001.tar", ("repeated_key", "a")),
        ("train-000004.tar", ("repeated_key", "a")),
        ("train-000002.tar", ("gap_in_numbering", "")),
    ]
    assert report.findings[-1].detail == "2 missing"
    assert report.sums["documents"] == report.sums["samples"] == 7


def test_a_shard_that_is_there_twice_is_named_in_the_time_of_its_keys() -> None:
    """And not of their square."""
    count = 40_000
    reports = [ShardReport(f"{name}.tar") for name in "ab"]
    for report in reports:
        report.keys = "".join(f"{n:08d}\0" for n in range(count))
        report.hashes.extend(range(count))
        report.crcs.extend(range(count))
    started = time.process_time()
    found = repeated(reports)
    assert time.process_time() - started < 3
    assert [each.key for each in found] == [f"{n:08d}" for n in range(count)]
    assert {(each.shard, each.reason) for each in found} == {("b.tar", "same_document")}


def test_the_report_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"x-{n:06d}.tar", data) for n, (data, _) in enumerate(SHAPES.values())]
    alone, shared = (
        validate(paths, layout=Layout(Kind.caption), workers=workers) for workers in (1, 2)
    )
    assert alone == shared
    everything = Counter(reason for _, expected in SHAPES.values() for reason, _ in expected)
    counts = alone.defects + alone.notes
    del counts["repeated_key"], counts["same_document"]
    assert counts == everything
    assert set(everything) <= set(DEFECTS) | set(NOTES)


def test_real_shards_have_no_defect() -> None:
    for kind in corpora.KINDS:
        for split, documents in (("train", 120), ("held_out", 30)):
            paths = sorted(corpora.corpus_directory().glob(f"{kind.value}/{split}-*.tar"))
            report = validate(paths, layout=Layout(kind))
            assert report.findings == []
            assert report.sums["documents"] == report.sums["samples"] == documents
            assert report.sums["decoded"] == report.sums["image_files"]


def run(capsys: pytest.CaptureFixture, *flags: str) -> tuple[object, str]:
    """Exit code and standard output."""
    code: object = 0
    try:
        command.main(["--kind", "caption", "--workers", "1", *flags])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_the_command_says_yes_or_no(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "x.tar", WHOLE)
    pattern = str(tmp_path / "*.tar")
    code, out = run(capsys, "--shards", pattern)
    assert (code, out.splitlines()[-1]) == (0, "0 defects")
    bad = [m for n in range(9) for m in pair(f"bad\n{n}", text=b"")]
    write(tmp_path, "y.tar", archive([*bad, *GOOD]))
    code, out = run(capsys, "--shards", pattern)
    assert (code, out.splitlines()[-1]) == (1, "9 defects")
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("empty_text ")] == [
        ["empty_text", "9"]
    ]
    assert out.count("  bad\\n") == 2 * command.LISTED
    assert out.count("and 4 more; --all lists them") == 2
    _, out = run(capsys, "--shards", pattern, "--all")
    assert out.count("  bad\\n") == 18
    code, out = run(capsys, "--shards", pattern, "--json")
    told = json.loads(out)
    assert (code, told["defects"], told["notes"]) == (1, {"empty_text": 9}, {"odd_name": 9})
    assert [f["key"] for f in told["findings"] if f["is_defect"]] == [f"bad\n{n}" for n in range(9)]
    code, _ = run(capsys, "--shards", str(tmp_path / "none-*.tar"))
    assert str(code).startswith("error: --shards is ")


def test_a_shard_that_cannot_be_read_is_a_defect(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    report = validate([tmp_path / "x.tar"], layout=Layout(Kind.caption))
    assert found(report) == Counter([("unreadable", "")])
