"""What the members of a sample become: documents of texts and images, or a reason why not."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import index
from data.block import Blocks
from data.documents import parse, variants
from data.index import load
from data.indexing import index_shard
from data.layout import Reader, build, read_document
from data.plan import Piece
from data.prepare import index as index_command
from data.prepare import tokenizer as tokenizer_command
from data.prepare.validate import validate
from data.samples import BadSample
from data.tokenizer import Tokenizer
from nmm.config import Kind, Layout, SourceConfig
from nmm.errors import UserError
from tests import corpora
from tests.corpora import write_tar

PICTURE = corpora.jpeg(np.random.default_rng(0))
CAPTIONS, TEXTS = Layout(Kind.caption, "caption"), Layout(Kind.text, "text")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path())


def members(value: object, *, name: str) -> dict[str, bytes]:
    """A picture, a text that must not be read, and a JSON with the value in a field."""
    return {"jpg": PICTURE, "txt": b"not this", "json": json.dumps({name: value, "a": 1}).encode()}


def outcome(layout: Layout, sample: dict[str, bytes]) -> list[Any]:
    """The text of every variant, or the reason why there is none."""
    found = []
    for variant in range(variants(layout, sample)):
        try:
            found.append(parse(layout, sample, variant=variant).parts[-1])
        except BadSample as bad:
            found.append((bad.reason,))
    return found


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ["a cat"]),
        (["a cat"], ["a cat"]),
        (["a cat", "a\r\ndog"], ["a cat", "a\ndog"]),
        (["a cat", None, " \n", "", "a dog"], ["a cat", *[("empty_text",)] * 3, "a dog"]),
        (["a cat", 3, ["a"], "\0", "\ud800"],
         ["a cat", ("bad_text",), ("bad_text",), ("nul_in_text",), ("not_utf8",)]),
        ([], [("empty_text",)]),
        ("", [("empty_text",)]),
        (None, [("missing_text",)]),
        (3.5, [("bad_text",)]),
        ({"en": "a cat"}, [("bad_text",)]),
    ],
)  # fmt: skip
def test_captions_of_a_field(value: object, expected: list) -> None:
    assert outcome(CAPTIONS, members(value, name="caption")) == expected


def test_many_captions_are_read_in_the_time_of_their_bytes() -> None:
    """And not of their square: a sample of a megabyte would hold a worker for an hour."""
    sample = members([f"caption {n}" for n in range(5000)], name="caption")
    start = time.process_time()
    parse(CAPTIONS, sample)
    once = time.process_time()
    assert len(outcome(CAPTIONS, sample)) == 5000
    assert time.process_time() - once < 500 * (once - start)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b'{"caption": ' + b"[" * 100_000, "bad_json"),
        (b'{"caption": ' + b"1" * 100_000 + b"}", "bad_json"),
        (b'"a cat"', "bad_layout"),
        (b'["a cat"]', "bad_layout"),
        (b'{"text": "a cat"}', "missing_text"),
        ('{"caption": "über"}'.encode("latin-1"), "not_utf8"),
        (b'{"caption": "a\0"}', "nul_in_text"),
    ],
)
def test_json_that_holds_no_caption(data: bytes, reason: str) -> None:
    sample = {"jpg": PICTURE, "txt": b"not this", "json": data}
    assert outcome(CAPTIONS, sample) == [(reason,)]
    del sample["json"]
    assert outcome(CAPTIONS, sample) == [("missing_json",)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("prose", "prose"), (["prose"], ("bad_text",)), (None, ("missing_text",)), (1, ("bad_text",))],
)
def test_text_of_a_field(value: object, expected: object) -> None:
    assert outcome(TEXTS, members(value, name="text")) == [expected]
    assert outcome(Layout(Kind.text), members(value, name="text")) == ["not this"]


def captioned(path: Path) -> Path:
    """Three images with captions of their own, and one without."""
    given = {"a": ["one", "two words", "three more words"], "b": ["x", None, 7], "c": "alone"}
    samples = []
    for key, value in {**given, "d": []}.items():
        samples += [(f"{key}.jpg", PICTURE), (f"{key}.json", json.dumps({"caption": value}))]
    return write_tar(path, [(n, d if isinstance(d, bytes) else d.encode()) for n, d in samples])


def test_every_caption_of_an_image_is_a_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Documents of one sample share its bytes; each is laid out with its own caption."""
    path = captioned(tmp_path / "x-000000.tar")
    index_shard(path, layout=CAPTIONS, tokenizer=tokenizer).save(path)
    found = load(path, layout=CAPTIONS, tokenizer=tokenizer)
    assert [found.key(i) for i in range(len(found))] == ["a", "a", "a", "b", "c"]
    assert found.variant.tolist() == [0, 1, 2, 0, 0]
    assert found.dropped == [("empty_text", "b"), ("bad_text", "b"), ("empty_text", "d")]
    assert found.start.tolist()[:3] == [0] * 3
    assert (found.totals.documents, found.images) == (5, 5)
    source = SourceConfig(Kind.caption, str(path), str(path), 1.0, text_field="caption")
    corpus = corpora.open_corpus(corpora.config(sources={"only": source}))
    texts = ["one", "two words", "three more words", "x", "alone"]
    for number, text in enumerate(texts):
        length = int(corpus.sources[0].shards[0].lengths[number])
        plan = [[Piece(0, 0, number, 0, length)]]
        batch = build(plan, reader=Reader(corpus, seed=0), row_tokens=length, blocks=Blocks())
        assert tokenizer.decode(batch.tokens[0].tolist()) == text
        assert len(batch.pixels) == 1
    report = validate([path], layout=CAPTIONS)
    assert report.defects == {"empty_text": 2, "bad_text": 1}
    assert report.findings[0].detail == "caption 2 of 3"
    assert (report.sums["documents"], report.sums["samples"]) == (5, 4)


def test_another_field_is_another_corpus(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = captioned(tmp_path / "x.tar")
    made = index_shard(path, layout=CAPTIONS, tokenizer=tokenizer)
    made.save(path)
    for layout, now in ((Layout(Kind.caption), None), (Layout(Kind.caption, "alt"), "alt")):
        with pytest.raises(UserError, match=f"its text_field is caption, now it is {now}; run"):
            load(path, layout=layout, tokenizer=tokenizer)
    path.with_name("x.tar.index").unlink()
    with pytest.raises(UserError, match=r"has no index; run .* --text-field caption`"):
        load(path, layout=CAPTIONS, tokenizer=tokenizer)
    places = {name: vars(made)[name] for name in index.DIGESTED}
    given: dict = {
        "layout": CAPTIONS, "tokenizer_hash": "", "shard_bytes": 1, "dropped": [], **places
    }  # fmt: skip
    digests = {
        index.assemble(**given, skipped=made.skipped, variant=np.array(variant, np.int32)).digest
        for variant in ([0, 0, 0, 0, 0], [0, 1, 2, 0, 0], [0, 2, 1, 0, 0])
    }
    assert len(digests) == 3


def test_a_corpus_without_variants_keeps_its_digest(tokenizer: Tokenizer) -> None:
    """Of the arrays that said before what is read; runs on it go on."""
    shard = next((corpora.corpus_directory() / "caption").glob("*.tar"))
    stored = load(shard, layout=Layout(Kind.caption), tokenizer=tokenizer)
    names = ("start", "stop", "crc", "segment", "border", "key_bytes", "key_border")
    told = hashlib.sha256(b"".join(vars(stored)[name].tobytes() for name in names)).hexdigest()
    assert (stored.digest, stored.variant.any()) == (told, False)


def test_the_commands_read_a_field(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The tokenizer samples every caption; the index counts them; wrong flags are refused."""
    path = captioned(tmp_path / "x.tar")
    layout = Layout(Kind.caption, "caption")
    assert sorted(tokenizer_command._texts(layout, path)) == [
        "alone", "one", "three more words", "two words", "x"
    ]  # fmt: skip
    flags = ["--shards", str(path), "--tokenizer", str(corpora.tokenizer_path()), "--workers", "1"]
    index_command.main(["--kind", "caption", "--text-field", "caption", *flags])
    assert "documents                            5" in capsys.readouterr().out
    assert read_document_of(path) == {"jpg", "json"}
    with pytest.raises(SystemExit, match=r"--text-field is caption, but the kind is interleaved"):
        index_command.main(["--kind", "interleaved", "--text-field", "caption", *flags])
    with pytest.raises(UserError, match=r"data\.sources\.a\.text_field is t, but the kind is int"):
        corpora.config(sources={"a": SourceConfig(Kind.interleaved, "", "", 1.0, text_field="t")})
    with pytest.raises(SystemExit, match=r"FIELD of --source text: is empty; name a field"):
        tokenizer_command.main(["--source", f"text:={path}", "--vocab-size", "300", "--out", "x"])


def read_document_of(path: Path) -> set[str]:
    source = SourceConfig(Kind.caption, str(path), str(path), 1.0, text_field="caption")
    corpus = corpora.open_corpus(corpora.config(sources={"only": source}))
    return set(read_document(corpus.sources[0].shards[0], 3))
