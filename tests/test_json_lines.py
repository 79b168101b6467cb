"""JSON lines are shards: every line by its number, none half, the same batches as from tars."""

import base64
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data import jsonl
from data.corpus import find_shards
from data.index import load
from data.indexing import index_shard
from data.loader import Loader
from data.prepare import validate as validate_command
from data.prepare.index import index_shards
from data.prepare.validate import validate
from data.shards import ShardWriter
from data.store import LOCAL
from data.tokenizer import Tokenizer
from nmm.batch import PackedBatch
from nmm.config import Kind, Layout, SourceConfig
from nmm.errors import UserError
from tests import corpora

LAYOUT = Layout(Kind.text, "text")
# Every line of a file, and the reason why it is no document ("": it is one; None: no sample).
LINES: list[tuple[bytes, str | None]] = [
    (b'\xef\xbb\xbf{"text": "with a mark", "url": "x"}', ""),
    (b"", None),
    (b'{"text": "a windows line"}\r', ""),
    (b" \t\r", None),
    (b"{", "bad_json"),
    (b"no JSON at all", "bad_json"),
    (b'["text"]', "bad_layout"),
    (b'"text"', "bad_layout"),
    (b"null", "bad_layout"),
    (b'{"body": "x"}', "missing_text"),
    (b'{"text": null}', "missing_text"),
    (b'{"text": 7}', "bad_text"),
    (b'{"text": ["a", "b"]}', "bad_text"),
    (b'{"text": " \\n"}', "empty_text"),
    (b'{"text": "\\u0000"}', "nul_in_text"),
    (b'{"text": "\\ud800"}', "not_utf8"),
    ('{"text": "über"}'.encode("latin-1"), "not_utf8"),
    ('{"text": "über\\nzwei"}'.encode(), ""),
    (b'{"text": "cut of', "bad_json"),
]
BAD = [(reason, f"{n:08d}") for n, (_, reason) in enumerate(LINES, start=1) if reason]
GOOD = [f"{n:08d}" for n, (_, reason) in enumerate(LINES, start=1) if reason == ""]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path())


def written(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def text_lines(*, seed: int = 0, count: int = 40) -> list[bytes]:
    rng = np.random.default_rng(seed)
    words = [int(rng.choice([1, 5, 20, 100])) for _ in range(count)]
    return [json.dumps({"text": corpora.sentence(rng, n), "n": n}).encode() for n in words]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_lines_do_not_depend_on_how_the_bytes_come(size: int) -> None:
    data = b"\n".join(line for line, _ in LINES) + b"\n\nlast"
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    lines = list(jsonl._lines(chunks))
    assert [line.data for line in lines] == data.split(b"\n")
    assert all(data[n.start : n.start + n.size] == n.data for n in lines)
    assert b"".join(line.data + b"\n" for line in jsonl._lines([*chunks, b"\n"])) == data + b"\n"


def test_every_line_is_a_document_or_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "x.jsonl", [line for line, _ in LINES])
    found = index_shard(path, layout=LAYOUT, tokenizer=tokenizer)
    assert [found.key(i) for i in range(len(found))] == GOOD
    assert found.dropped == BAD
    data = path.read_bytes()
    ranges = zip(found.start.tolist(), found.stop.tolist(), strict=True)
    assert [data[a:b] for a, b in ranges] == [line for line, reason in LINES if reason == ""]
    report = validate([path], layout=LAYOUT)
    assert [(f.reason, f.key) for f in report.findings] == BAD
    assert report.sums["samples"] == sum(reason is not None for _, reason in LINES)
    assert report.sums["documents"] == len(GOOD)


def test_a_line_without_an_end_is_given_up(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are not held, and the lines around it are read."""
    monkeypatch.setattr(jsonl, "LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 64)
    lines = text_lines(count=2)
    path = written(tmp_path / "x.jsonl", [lines[0], b'{"text": "' + b"a" * 5000 + b'"}', lines[1]])
    found = index_shard(path, layout=LAYOUT, tokenizer=tokenizer)
    assert found.dropped == [("long_line", "00000002")]
    assert path.read_bytes()[int(found.start[1]) :] == lines[1]


def batches_of(source: SourceConfig) -> list[PackedBatch]:
    config = corpora.config(sources={"only": source})
    loader = Loader(corpora.open_corpus(config), config, rank=0, world=1, micro_batch=4, workers=0)
    return [batch for step, _ in islice(loader, 3) for batch in step]


def test_batches_are_those_of_a_tar(tmp_path: Path) -> None:
    """The same texts in the same order of files: the same tokens in the same rows."""
    for shard in range(3):
        lines = text_lines(seed=shard)
        written(tmp_path / f"x-{shard}.jsonl", lines)
        with ShardWriter(tmp_path, name=f"x-{shard}", documents_per_shard=1000) as writer:
            for number, line in enumerate(lines):
                writer.text(f"{number}", json.loads(line)["text"])
    forms = {".jsonl": "text", ".tar": None}
    found = []
    for suffix, field in forms.items():
        shards = find_shards(f"{tmp_path}/x-*{suffix}", key="k", store=LOCAL)
        assert len(shards) == 3
        layout = Layout(Kind.text, field)
        index_shards(shards, layout=layout, tokenizer=corpora.tokenizer_path())
        pattern = f"{tmp_path}/x-*{suffix}"
        found.append(batches_of(SourceConfig(Kind.text, pattern, pattern, 1.0, text_field=field)))
    for mine, theirs in zip(*found, strict=True):
        for name in ("tokens", "labels", "document", "position", "source", "modality"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert found[0][0].keys[0][0].partition("/")[0].endswith(".jsonl")


def test_stories_with_their_images_in_a_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """MMC4 as JSON lines, with images as base64; a name can find no member there."""
    image = base64.b64encode(corpora.jpeg(np.random.default_rng(0))).decode()
    infos = [{"matched_text_index": 1, "image_base64": image},
             {"matched_text_index": 0, "image_name": "a.jpg"}]  # fmt: skip
    line = json.dumps({"text_list": ["One.", "Two."], "image_info": infos}).encode()
    path = written(tmp_path / "x.jsonl", [line, line])
    layout = Layout(Kind.interleaved)
    found = index_shard(path, layout=layout, tokenizer=tokenizer)
    assert (found.image_counts.tolist(), found.skipped.tolist()) == ([1, 1], [1, 1])
    report = validate([path], layout=layout)
    assert (report.defects, report.notes) == ({}, {"skipped_image": 2})


@pytest.mark.parametrize(
    ("data", "layout", "sentence"),
    [
        (b"", LAYOUT, r"x\.jsonl is empty \(0 bytes\)"),
        (b"\x1f\x8b\x08\x00", LAYOUT, "is gzip data and not JSON lines; name it as what it is"),
        (b"\x28\xb5\x2f\xfd", LAYOUT, "is zstandard data and not JSON lines"),
        (b'{"text": "x"}', Layout(Kind.text), r"its text is not named; add --text-field"),
        (b'{"body": "x"}', LAYOUT, r"no document of kind text: it has \.json \(1 missing_text\)"),
        (b'{"text": "x"}', Layout(Kind.caption), r"kind caption: it has \.json \(1 missing_image"),
        (b"\n\n \n", LAYOUT, "no document of kind text: it has no files"),
    ],
)
def test_what_holds_no_document_is_refused(
    data: bytes, layout: Layout, sentence: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = written(tmp_path / "x.jsonl", [data])
    with pytest.raises(UserError, match=sentence):
        index_shard(path, layout=layout, tokenizer=tokenizer)


def test_the_validator_compares_no_line_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two files have lines of the same numbers; a missing file between them is noted."""
    for number in (1, 3):
        written(tmp_path / f"x-{number:04d}.jsonl", text_lines())
    flags = ["--kind", "text", "--text-field", "text", "--workers", "1", "--json"]
    validate_command.main([*flags, "--shards", f"{tmp_path}/*.jsonl"])
    told = json.loads(capsys.readouterr().out)
    assert (told["defects"], told["notes"]) == ({}, {"gap_in_numbering": 1})
    (finding,) = told["findings"]
    assert finding["shard"] == f"{tmp_path}/x-0002.jsonl"
    written(tmp_path / "empty.jsonl", [b""])
    report = validate([tmp_path / "empty.jsonl"], layout=LAYOUT)
    assert report.defects == {"empty_file": 1}
    with pytest.raises(SystemExit, match="the field of its text is not named"):
        validate_command.main(["--kind", "text", "--shards", f"{tmp_path}/x-*.jsonl"])


def test_an_index_belongs_to_its_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "x.jsonl", text_lines())
    index_shard(path, layout=LAYOUT, tokenizer=tokenizer).save(path)
    assert len(load(path, layout=LAYOUT, tokenizer=tokenizer)) == 40
    source = SourceConfig(Kind.text, str(path), str(path), 1.0, text_field="text")
    path.write_bytes(path.read_bytes().replace(b"the", b"The"))
    with pytest.raises(UserError, match=r"x\.jsonl has changed since it was indexed"):
        batches_of(source)
