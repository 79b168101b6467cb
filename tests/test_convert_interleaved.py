"""Interleaved rows of three layouts: reading order is kept, lost images are counted."""

import base64
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from nmm.config import Kind
from tests.converting import check_reported, picture, read, run, write_lines

WHOLE = ("--held-out-fraction", 0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """pictures/{0,1,2}.jpg, of which the first is no image."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").write_bytes(b"<html>")
    for index in (1, 2):
        (tmp_path / "pictures" / f"{index}.jpg").write_bytes(picture(index))
    return tmp_path / "pictures"


def encoded(index: int) -> str:
    return base64.b64encode(picture(index)).decode()


def test_sequences_keep_the_reading_order_and_drop_a_dangling_image_only(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = [{"type": "image", "small": f"{index}.jpg"} for index in range(4)]
    text = [{"type": "text", "text": word} for word in ("one", "two\r\n", "", "three", None)]
    rows = [
        {"sequence": [text[0], text[1], image[1], text[2], text[3], image[2], image[1]]},
        {"sequence": [image[2], text[0], image[3], image[0], text[3]]},
        {"sequence": [image[2], text[2]]},
        {"sequence": [{"type": "video"}, text[0], 7, text[4]]},
        {"sequence": "text"},
    ]
    source = write_lines(pictures.parent / "book.jsonl", rows)
    out = pictures.parent / "out"
    run("interleaved-jsonl", "--input", source, "--out", out, *WHOLE,
        "--image-field", "small", "--image-root", pictures)  # fmt: skip
    assert read(Kind.interleaved, out) == [
        ["one\n\ntwo", picture(1), "three", picture(2), picture(1)],
        [picture(2), "one\n\nthree"],
        ["one"],
    ]
    check_reported(
        capsys.readouterr().out,
        "1 image that cannot be read: left out of its document",
        "1 image that is not JPEG, PNG, WebP or GIF: left out of its document",
        "2 segment that is neither text nor image: left out of its document",
        "1 no text in text: left out of its document",
        "1 no text in the document",
        "1 no list in sequence, in texts and images, or in text_list and image_info",
    )


OBELICS = [
    {"texts": ["Title\n\nA cat:", None, "It sleeps."], "images": [None, "1.jpg", None]},
    {"texts": [None, "One.", None, "Two."], "images": [None, None, "https://x.org/a.jpg", None]},
    {"texts": [None, None, "Last."], "images": [encoded(2), "none.jpg", None]},
    {"texts": ["Both."], "images": ["1.jpg"]},
    {"texts": ["One.", "Two."], "images": [None]},
    {"texts": [None, " "], "images": ["1.jpg", None]},
]
OF_OBELICS = [
    ["Title\n\nA cat:", picture(1), "It sleeps."],
    ["One.\n\nTwo."],
    [picture(2), "Last."],
]
LOST_OF_OBELICS = (
    "1 image that is null: left out of its document",
    "1 image given by a URL, never fetched: left out of its document",
    "1 image that cannot be read: left out of its document",
    "1 text and image at the same place",
    "1 no text in the document",
)


def test_obelics_in_lines_and_parquet(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures.parent
    source = write_lines(folder / "a.jsonl", OBELICS)
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(source.read_bytes()))
    table = pyarrow.Table.from_pylist([{**row, "metadata": "[]"} for row in OBELICS])
    parquet.write_table(table, folder / "a.parquet")
    for form, name in (("jsonl", "a.jsonl.zst"), ("parquet", "a.parquet")):
        run(f"interleaved-{form}", "--input", folder / name, "--out", folder / form, *WHOLE,
            "--image-root", pictures)  # fmt: skip
        assert read(Kind.interleaved, folder / form) == OF_OBELICS
        check_reported(
            capsys.readouterr().out, *LOST_OF_OBELICS, "1 texts and images of different lengths"
        )


def test_images_in_parquet_may_be_structs(tmp_path: Path) -> None:
    rows = [
        {"texts": [None, "a"], "images": [{"bytes": picture(1), "path": "x.jpg"}, None]},
        {"texts": ["b", None], "images": [None, {"bytes": picture(2), "path": None}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    run("interleaved-parquet", "--input", tmp_path / "a.parquet", "--out", tmp_path, *WHOLE)
    assert read(Kind.interleaved, tmp_path) == [[picture(1), "a"], ["b", picture(2)]]


def test_mmc4_puts_matched_images_before_their_text(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "text_list": ["First.", "Second.", "Third.", "Fourth."],
            "image_info": [
                {"image_name": "2.jpg", "matched_text_index": 2},
                {"image_base64": encoded(5), "image_name": "gone.jpg", "matched_text_index": 0},
                {"image_name": "1.jpg", "raw_url": "http://x", "matched_text_index": 2},
                {"image_name": "none.jpg", "matched_text_index": 3},
                {"image_name": None, "image_base64": "", "matched_text_index": 3},
                {"image_name": "1.jpg", "matched_text_index": 4},
                {"image_base64": "/9j/" + "A" * 61, "matched_text_index": 1},
                "no image",
            ],
        }
    ]
    source = write_lines(pictures.parent / "docs.jsonl", rows)
    out = pictures.parent / "out"
    run("interleaved-jsonl", "--input", source, "--out", out, *WHOLE, "--image-root", pictures)
    assert read(Kind.interleaved, out) == [
        [picture(5), "First. Second.", picture(2), picture(1), "Third. Fourth."]
    ]
    check_reported(
        capsys.readouterr().out,
        "1 image that cannot be read: left out of its document",
        "1 image without bytes and name: left out of its document",
        "2 image that is matched to no text: left out of its document",
        "1 image with broken base64: left out of its document",
    )
