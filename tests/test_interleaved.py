"""Interleaved layouts of others: what is in the sample is read, what is not is counted."""

import base64
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data.documents import parse
from data.index import load
from data.indexing import index_shard
from data.loader import Loader
from data.plan import plan_rows
from data.prepare import index as command
from data.prepare.inspect import page
from data.prepare.inspect.facts import look
from data.prepare.validate import validate
from data.samples import BadSample
from data.tokenizer import Tokenizer
from nmm.config import Kind, Layout, SourceConfig
from tests import corpora
from tests.corpora import write_tar

RNG = np.random.default_rng(0)
A, B, C = (corpora.jpeg(RNG) for _ in range(3))
IN_TEXT = base64.b64encode(A).decode()
HALF = corpora.jpeg(RNG, width=40, height=40)[:-20]
LAYOUT = Layout(Kind.interleaved)
MEMBERS = {"0.jpg": A, "b.jpg": B, "jpg": C}
KEY = "dir.1/doc"


def outcome(layout: object) -> tuple[list[str | bytes], int] | str:
    sample = {**MEMBERS, "json": json.dumps(layout).encode()}
    try:
        return parse(LAYOUT, sample, key=KEY)
    except BadSample as bad:
        return bad.reason


def parallel(*places: object) -> dict:
    """OBELICS: a string is a text, a tuple an image, None neither."""
    return {
        "texts": [place if not isinstance(place, tuple) else None for place in places],
        "images": [place[0] if isinstance(place, tuple) else None for place in places],
        "metadata": None,
    }


def mmc4(*texts: object, images: object) -> dict:
    return {"text_list": list(texts), "image_info": images, "similarity_matrix": [[0.1]]}


def at(index: object, **image: object) -> dict:
    return {"matched_text_index": index, "matched_sim": 0.2, **image}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (parallel("x", ("0.jpg",), "y"), (["x", A, "y"], 0)),
        (parallel(("0.JPG",), "x", ("doc.b.jpg",)), ([A, "x", B], 0)),
        (parallel(("doc.jpg",), "x", ("DOC.jpg",)), ([C, "x"], 1)),
        (parallel((IN_TEXT,), "x"), ([A, "x"], 0)),
        (parallel((f"data:image/png;base64,{IN_TEXT}",), "x"), ([A, "x"], 0)),
        (parallel(("\n".join([IN_TEXT[:100], IN_TEXT[100:]]),), "x"), ([A, "x"], 0)),
        (parallel("x", None, ("",), ("7.jpg",)), (["x"], 3)),
        (parallel("x", ("https://host/0.jpg",), ("other.jpg",), ("data:image/png;base64,",)),
         (["x"], 3)),
        (parallel("x", ("https://host/" + "a" * 300,)), (["x"], 1)),
        (parallel("", ("0.jpg",)), "empty_text"),
        (parallel("x", ("a" * 257,)), "bad_base64"),
        (parallel("x", ("data:image/png;base64,@@@",)), "bad_base64"),
        (parallel("x", ("json",)), (["x", b"..."], 0)),
        (parallel("x", 3), "bad_layout"),
        (parallel("x", (3,)), "bad_layout"),
        ({"texts": ["x"], "images": ["0.jpg"]}, "bad_layout"),
        ({"texts": ["x"], "images": None}, "bad_layout"),
        ({"texts": "x", "images": "0"}, "bad_layout"),
        ({}, "bad_layout"),
        (mmc4("One.", "", "Two.", images=[]), (["One.", " Two."], 0)),
        (mmc4("One.", "Two.", images=[at(1, image_base64=IN_TEXT), at(0, image_name="0.jpg")]),
         ([A, "One.", A, " Two."], 0)),
        (mmc4("One.", images=[at(0, image_name="doc.b.jpg"), at(0, image_name="0.jpg")]),
         ([B, A, "One."], 0)),
        (mmc4("One.", images=[at(0, image_name="x.jpg", image_base64=IN_TEXT)]), ([A, "One."], 0)),
        (mmc4("One.", images=[at(0, image_name="x.jpg"), at(0), at(0, image_base64="")]),
         (["One."], 3)),
        (mmc4("One.", images=[at(0, image_name=None, image_base64=" \n")]), (["One."], 1)),
        (mmc4("One.", images=[at(0, image_base64="garbage!")]), "bad_base64"),
        (mmc4("One.", images=[at(0, image_base64=7)]), "bad_base64"),
        (mmc4("One.", images=[at(1)]), "bad_layout"),
        (mmc4("One.", images=[at(-1)]), "bad_layout"),
        (mmc4("One.", images=[at(True)]), "bad_layout"),
        (mmc4("One.", images=[at(0, image_name=["0.jpg"])]), "bad_layout"),
        (mmc4("One.", images={"0": at(0)}), "bad_layout"),
        (mmc4("One.", images=None), "bad_layout"),
        (mmc4("One.", images=["0.jpg"]), "bad_layout"),
        (mmc4("One.", None, images=[]), "bad_layout"),
        (mmc4(" ", images=[at(0, image_name="0.jpg")]), "empty_text"),
    ],
)  # fmt: skip
def test_layouts(layout: dict, expected: object) -> None:
    found = outcome(layout)
    if isinstance(expected, tuple) and b"..." in expected[0]:
        assert found == (["x", json.dumps(layout).encode()], 0)  # named, so it is read as an image
    else:
        assert found == expected


STORIES = {
    "whole": (parallel("see this", ("0.jpg",), "and that"), 0),
    "holes": (parallel("see this", None, ("9.jpg",), "and that", ("0.jpg",)), 2),
    "mmc4": (mmc4("One.", "Two.", images=[at(1, image_base64=IN_TEXT), at(0)]), 1),
    "bare": (parallel("no picture is here", ("https://host/a.jpg",)), 1),
    "half": (parallel("x", (base64.b64encode(HALF).decode(),), None), 1),
    "none": (parallel(None), None),
    "page": (parallel("x", (base64.b64encode(b"<html>" * 200).decode(),), None), None),
}


def shard(directory: Path) -> Path:
    """The stories, each with a picture beside it where one is named."""
    members = []
    for key, (layout, _) in STORIES.items():
        members.append((f"{key}.json", json.dumps(layout).encode()))
        members += [(f"{key}.0.jpg", A)] if '"0.jpg"' in json.dumps(layout) else []
    return write_tar(directory / "x-000000.tar", members)


def test_images_that_are_missing_are_counted_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In the index, its table, the page, the validator, and in training once for every reading."""
    path = shard(tmp_path)
    flags = ["--shards", str(path), "--tokenizer", str(corpora.tokenizer_path()), "--workers", "1"]
    command.main(["--kind", "interleaved", *flags])
    assert "skipped images                       5\n" in capsys.readouterr().out
    stored = load(path, layout=LAYOUT, tokenizer=Tokenizer(corpora.tokenizer_path()))
    keys = [stored.key(i) for i in range(len(stored))]
    skipped = {key: count for key, (_, count) in STORIES.items() if count is not None}
    assert dict(zip(keys, stored.skipped.tolist(), strict=True)) == skipped
    assert stored.dropped == [("empty_text", "none"), ("image_header", "page")]
    assert stored.totals.skipped_images == sum(skipped.values())

    report = validate([path], layout=LAYOUT)
    notes = {f.key: f.detail for f in report.findings if f.reason == "skipped_image"}
    assert notes == {"holes": "2 of 3", "mmc4": "1 of 2", "bare": "1 of 1"}
    assert report.defects == {"empty_text": 1, "image_header": 1, "image_decode": 1}

    source = SourceConfig(Kind.interleaved, str(path), str(path), 1.0)
    config = corpora.config(sources={"only": source}, global_rows=1, context_tokens=32)
    corpus = corpora.open_corpus(config)
    rows = 40
    served = [p for row, _ in islice(plan_rows(corpus, config), rows) for p in row]
    readings = sum(skipped[keys[p.document]] for p in served if p.start == 0 and p.document != 4)
    loader = Loader(corpus, config, rank=0, world=1, micro_batch=1, workers=0)
    batches = [batch for (batch,), _ in islice(loader, rows)]
    assert sum(batch.counts["skipped_images"] for batch in batches) == readings > 10
    assert {d.key for batch in batches for d in batch.dropped} == {"half"}  # counted as dropped
    html = page.render(look(corpus, config, rows=1, planned_rows=1))
    assert "5 images that documents name are not in their samples" in html


def test_the_text_of_a_story_does_not_depend_on_how_its_images_are_kept(tmp_path: Path) -> None:
    """By name, as base64, as MMC4 or parallel lists: the same document to the token."""
    tokenizer = Tokenizer(corpora.tokenizer_path())
    forms = {
        "names": parallel("One.", ("0.jpg",), " Two."),
        "base64": parallel("One.", (IN_TEXT,), " Two."),
        "mmc4": mmc4("One.", "Two.", images=[at(1, image_base64=IN_TEXT)]),
    }
    members = [(f"{key}.json", json.dumps(layout).encode()) for key, layout in forms.items()]
    path = write_tar(tmp_path / "x.tar", [*members[:1], ("names.0.jpg", A), *members[1:]])
    found = index_shard(path, layout=LAYOUT, tokenizer=tokenizer)
    assert [found.segments(i).tolist() for i in range(3)] == [found.segments(0).tolist()] * 3
