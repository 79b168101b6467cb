"""Converters: nothing lost, splits disjoint, same bytes twice, bad input counted or refused."""

import json
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data import tar
from data.documents import parse
from data.prepare import convert
from data.prepare.foreign import split_text
from nmm.config import Kind, Layout


def jpeg(colour: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), (4 * colour, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def write_lines(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\r\n".join(lines))
    return path


def read(kind: Kind, directory: Path, name: str) -> list[list[str | bytes]]:
    documents = []
    for shard in sorted(directory.glob(f"{name}-*.tar")):
        raw = shard.read_bytes()
        for sample in tar.scan(shard).samples:
            assert not sample.fault
            members = tar.members_of(raw[sample.start : sample.stop])
            documents.append(parse(Layout(kind), members).parts)
    return documents


def run(*arguments: object) -> None:
    convert.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a refusal."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert isinstance(caught.value.code, str)
    return caught.value.code + capsys.readouterr().err


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """60 captions of 20 texts, and one line for every way to be unusable."""
    (tmp_path / "images").mkdir()
    for index in range(60):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(jpeg(index))
    (tmp_path / "images" / "page.jpg").write_bytes(b"<html>not found</html>")
    rows: list = [{"image": f"images/{i}.jpg", "caption": f"Text {i % 20}."} for i in range(60)]
    rows[0] = b"\xef\xbb\xbf" + json.dumps(rows[0]).encode()
    rows += [
        {"image": "images/0.jpg", "caption": " ", "alt": "from alt\r\nin two lines"},
        {"image": "images/none.jpg", "caption": "dangling"},
        {"image": "images/page.jpg", "caption": "a web page"},
        {"image": None, "caption": "no path"},
        {"image": "images/0.jpg", "caption": None},
        {"image": "images/0.jpg", "caption": ["a", "list"]},
        {"image": "images/0.jpg", "caption": "half \ud800"},
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
    train, held_out = read(Kind.caption, out, "train"), read(Kind.caption, out, "held_out")
    expected = [(jpeg(index), f"Text {index % 20}.") for index in range(60)]
    found = Counter((image, text) for image, text in train + held_out)
    assert found == Counter([*expected, (jpeg(0), "from alt\nin two lines")])
    assert not {text for _, text in train} & {text for _, text in held_out}
    assert len(held_out) > 3
    assert len(list(out.glob("train-*.tar"))) == -(-len(train) // 7)
    report = capsys.readouterr().out
    for line in (
        "1  no caption, took alt (first: captions.jsonl:61)",
        "1  image that cannot be read (first: captions.jsonl:62)",
        "1  image that is not JPEG, PNG, WebP or GIF (first: captions.jsonl:63)",
        "1  no path in image (first: captions.jsonl:64)",
        "2  no text in caption (first: captions.jsonl:65, captions.jsonl:66)",
        "1  half a surrogate pair in the text (first: captions.jsonl:67)",
        "1  not UTF-8 (first: captions.jsonl:68)",
        "1  not JSON (first: captions.jsonl:69)",
        "1  not a JSON object (first: captions.jsonl:70)",
    ):
        assert line in report


def test_the_same_input_gives_the_same_bytes(captions: Path) -> None:
    outs = [captions.parent / name for name in ("a", "b")]
    for out in outs:
        run("captions-jsonl", "--input", captions, "--out", out, "--held-out-fraction", 0.3)
    contents = [{shard.name: shard.read_bytes() for shard in out.iterdir()} for out in outs]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"train-000000.tar", "held_out-000000.tar"}


def test_interleaved_keeps_the_reading_order_and_drops_a_dangling_image_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    for index in (1, 2):
        (tmp_path / "pictures" / f"{index}.jpg").write_bytes(jpeg(index))
    image = [{"type": "image", "small": f"{index}.jpg"} for index in range(3)]
    text = [{"type": "text", "text": word} for word in ("one", "two\r\n", "", "three")]
    rows = [
        {"sequence": [text[0], text[1], image[1], text[2], text[3], image[2], image[1]]},
        {"sequence": [image[2], text[0], image[0], text[3]]},
        {"sequence": [image[2], text[2]]},
        {"sequence": [{"type": "video"}, text[0], 7]},
        {"sequence": "text"},
    ]
    source = write_lines(tmp_path / "book.jsonl", rows)
    run("interleaved-jsonl", "--input", source, "--out", tmp_path / "out", "--held-out-fraction", 0,
        "--image-field", "small", "--image-root", tmp_path / "pictures")  # fmt: skip
    assert read(Kind.interleaved, tmp_path / "out", "train") == [
        ["one\n\ntwo", jpeg(1), "three", jpeg(2), jpeg(1)],
        [jpeg(2), "one\n\nthree"],
        ["one"],
    ]
    assert not list((tmp_path / "out").glob("held_out-*"))
    report = capsys.readouterr().out
    for line in (
        "1  image that cannot be read: left out of its document (first: book.jsonl:2)",
        "1  no text in sequence (first: book.jsonl:3)",
        "2  segment that is neither text nor image: left out of its document (first: book.jsonl:4",
        "1  no list in sequence (first: book.jsonl:5)",
    ):
        assert line in report


def test_text_files_are_documents_without_mark_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfIt was\r\na  cat.\r\n\r\nEnd\r\n")
    (tmp_path / "b.txt").write_bytes(b"   \n")
    (tmp_path / "c.txt").write_bytes("é 😀".encode())
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    run("text", "--input", tmp_path / "*.txt", "--out", tmp_path, "--held-out-fraction", 0)
    assert read(Kind.text, tmp_path, "train") == [["It was\na  cat.\n\nEnd"], ["é 😀"]]


def test_split_text_loses_no_word_and_ends_at_blank_lines() -> None:
    paragraphs = [" ".join(f"w{i}x{j}" for j in range(i % 30 + 1)) for i in range(200)]
    text = "\n\n".join(paragraphs)
    pieces = list(split_text(text, characters=400))
    assert [p for piece in pieces for p in piece.split("\n\n")] == paragraphs
    assert all(400 <= len(piece) + 2 < 800 for piece in pieces[:-1])
    lines = "\n".join(f"line {index}" for index in range(1000))
    pieces = list(split_text(lines, characters=100))
    assert "\n".join(pieces) == lines
    assert max(map(len, pieces)) < 220


def test_existing_shards_are_never_overwritten(
    captions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = captions.parent / "out"
    run("captions-jsonl", "--input", captions, "--out", out, "--held-out-fraction", 0.3)
    before = {shard.name: shard.read_bytes() for shard in out.iterdir()}
    message = refused(capsys, "captions-jsonl", "--input", captions, "--out", out)
    assert "held_out-000000.tar exists" in message
    run("captions-jsonl", "--input", captions, "--out", out, "--name", "more",
        "--held-out-fraction", 0)  # fmt: skip
    assert {name: (out / name).read_bytes() for name in before} == before
    assert len(read(Kind.caption, out, "more")) == 60


def test_a_wrong_image_root_stops_early_and_leaves_no_shard(
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
        (("text", "--input", "{empty}"), "--input holds no document"),
        (
            ("text", "--input", "{empty}", "--documents-per-shard", "0"),
            "--documents-per-shard is 0",
        ),
        (("text", "--input", "{empty}", "--held-out-fraction", "5"), "--held-out-fraction is 5.0"),
        (("text", "--input", "{empty}", "--name", "held_out"), "--name is held_out"),
        (("text", "--input", "{empty}", "--document-characters", "-1"), "characters is -1"),
        (("captions-jsonl", "--input", "{empty}"), "no document"),
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
    Path("cat.jpg").write_bytes(jpeg(1))
    subprocess.run([sys.executable, "-c", example], check=True)
    assert read(Kind.caption, tmp_path, "caption") == [[jpeg(1), "A cat sleeps."]]
    assert read(Kind.interleaved, tmp_path, "interleaved") == [["A cat:", jpeg(1), "It sleeps."]]
    assert read(Kind.text, tmp_path, "text") == [["The cat slept until noon."]]
