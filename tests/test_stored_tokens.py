"""Stored token ids give the batches that tokenising gives, or the run does not begin."""

import gzip
import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from data import ids, sequences
from data.corpus import find_shards
from data.index import load
from data.indexing import index_shard
from data.loader import Loader
from data.prepare import index as command
from data.prepare import tokenizer as tokenizer_command
from data.prepare.index import index_shards
from data.prepare.validate import validate
from data.store import LOCAL, Store
from data.tokenizer import IdTable, Tokenizer
from data.units import Units
from data.workers import context, forking
from nmm.batch import PackedBatch
from nmm.config import DataConfig, Kind, Layout, SourceConfig, UnitModality
from nmm.errors import UserError
from tests import corpora, servers
from tests import test_units as units
from tests.test_json_lines import LAYOUT, text_lines

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,  # as the zstd program
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path())


def index_all(directory: Path, **options: object) -> None:
    for kind in corpora.KINDS:
        shards = sorted((directory / kind.value).glob("*.tar"))
        given: dict = {"tokenizer": corpora.tokenizer_path(), **options}
        index_shards(shards, layout=Layout(kind), **given)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of all tests, with stored token ids."""
    directory = tmp_path_factory.mktemp("stored") / "corpus"
    shutil.copytree(corpora.corpus_directory(), directory)
    index_all(directory, store_tokens=True)
    return directory


def batches(config: DataConfig, *, workers: int = 0, steps: int = 6) -> list[PackedBatch]:
    corpus = corpora.open_corpus(config)
    loader = Loader(corpus, config, rank=0, world=1, micro_batch=4, workers=workers)
    return [batch for step, _ in islice(loader, steps) for batch in step]


def are_equal(found: list[PackedBatch], expected: list[PackedBatch]) -> bool:
    """Every tensor to the bit, every list."""
    pairs = [
        (getattr(mine, column.name), getattr(theirs, column.name))
        for mine, theirs in zip(found, expected, strict=True)
        for column in fields(PackedBatch)
    ]
    equal = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs]
    return len(equal) > 0 and all(equal)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_tokenising(workers: int, stored: Path) -> None:
    assert are_equal(batches(corpora.config(stored), workers=workers), batches(corpora.config()))
    plain, with_ids = (corpora.open_corpus(corpora.config(d)) for d in (None, stored))
    assert with_ids.fingerprint == plain.fingerprint  # a run may go on with stored ids
    for source, there in zip(plain.sources, with_ids.sources, strict=True):
        sizes = [Path(f"{path}.tokens").stat().st_size for path in there.paths]
        assert sum(sizes) == 2 * source.text_tokens


def test_units_and_texts_in_either_order(tmp_path: Path) -> None:
    """Units come from the shard, the texts around them from their ids; so do texts put first."""
    found = []
    for name in ("plain", "stored"):
        for split in ("train", "held_out"):
            units.write(tmp_path / name / split, documents=20)
            for kind, layout in units.LAYOUTS.items():
                shards = sorted((tmp_path / name / split / kind).glob("*.tar"))
                model, store_tokens = corpora.tokenizer_path(), name == "stored"
                for _ in range(2):  # the second time all are fresh
                    index_shards(shards, layout=layout, tokenizer=model, store_tokens=store_tokens)
        config = units.configured(tmp_path / name, repeat=True)
        config.sources["painted"].text_first_fraction = 0.5
        found.append(batches(config))
    assert are_equal(*found)
    stored = {path.parent.name for path in tmp_path.rglob("*.tokens")}
    assert stored == {"painted", "text"}  # speech without words has no ids


def test_texts_are_not_read_again(stored: Path, tmp_path: Path) -> None:
    """Text shards may hold anything then; of the others only the images are read from there."""
    copy = shutil.copytree(stored, tmp_path / "copy")
    for shard in (copy / "text").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert are_equal(batches(corpora.config(copy)), batches(corpora.config()))


@pytest.mark.parametrize("pieces", [65_536, 65_537])
def test_ids_take_two_bytes_or_four(pieces: int) -> None:
    """Only text is stored, so ids of units behind the pieces do not count."""
    table = IdTable(pad=0, unk=1, bos=2, eos=3, text_end=pieces, image=pieces, size=pieces + 1)
    kind = ids.type_of(table.with_units({UnitModality.speech: 100_000}))
    assert kind.itemsize == (2 if pieces == 65_536 else 4)
    texts = [[1, pieces - 2], None, [], Units(np.arange(3)), [pieces - 1]]
    raw = ids.to_bytes(texts, kind)
    assert np.frombuffer(raw, kind).tolist() == [1, pieces - 2, pieces - 1]
    assert sequences.segments(texts).tolist() == [2, -1, 0, -5, 1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[::7] = bytes(b ^ 1 for b in data[::7])
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (Path.unlink, r"\.tar\.tokens cannot be read \(No such file .* with --store-tokens or wit"),
        (truncate, r"is stale: it has \d+ bytes, the index .* says \d+; run .* --store-tokens`"),
        (change, r"\.tar\.tokens has changed since it was indexed .* on the shard with --force"),
    ],
)
def test_wrong_token_ids_stop_the_run(
    damage: Callable[[Path], None], sentence: str, stored: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(stored, tmp_path / "copy")
    for path in (copy / "text").glob("train-*.tokens"):
        damage(path)
    with pytest.raises(UserError, match=sentence) as caught:
        batches(corpora.config(copy))
    assert "\n" not in str(caught.value)
    force = "has changed" in str(caught.value)
    index_all(copy, store_tokens=True, force=force)  # the remedy
    assert are_equal(batches(corpora.config(copy)), batches(corpora.config()))


def test_what_is_fresh_is_what_was_asked_for(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture
) -> None:
    """Ids are added to an index that has none, kept by a run that does not ask, and made anew."""
    corpora.write_shards(tmp_path, kind=Kind.text, name="x", documents=9, per_shard=3, seed=0)
    tokens = [tmp_path / f"x-{n:06d}.tar.tokens" for n in range(3)]
    flags = ["--kind", "text", "--shards", f"{tmp_path}/*.tar", "--workers", "2"]
    flags += ["--tokenizer", str(corpora.tokenizer_path())]

    def times() -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.index"))]

    command.main(flags)
    assert not any(path.exists() for path in tokens)
    command.main([*flags, "--store-tokens"])
    before = times()
    contents = [path.read_bytes() for path in tokens]
    command.main(flags)
    command.main([*flags, "--store-tokens"])
    assert times() == before
    tokens[1].unlink()
    truncate(tokens[2])
    command.main([*flags, "--store-tokens"])
    assert [path.read_bytes() for path in tokens] == contents
    assert [a == b for a, b in zip(times(), before, strict=True)] == [True, False, False]
    assert "text tokens" in capsys.readouterr().out
    other = Tokenizer(corpora.train_tokenizer(tmp_path / "other.model", vocab_size=320))
    with pytest.raises(UserError, match=r"its tokenizer is .* --store-tokens`"):
        load(tmp_path / "x-000000.tar", layout=Layout(Kind.text), tokenizer=other)


def test_a_killed_index_run_leaves_nothing_half(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Whatever it leaves is either refused or right, and the next run completes it."""
    corpora.write_shards(tmp_path, kind=Kind.text, name="x", documents=900, per_shard=30, seed=0)
    shards = sorted(tmp_path.glob("*.tar"))
    options: dict = {"layout": Layout(Kind.text), "tokenizer": tokenizer.path, "store_tokens": True}
    with forking():
        process = context().Process(target=index_shards, args=(shards,), kwargs=options)
        process.start()
    while not any(tmp_path.glob("*.index")):
        time.sleep(0.0005)
    assert process.pid is not None
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = sorted(tmp_path.glob("*.index"))
    assert 0 < len(left) < len(shards)
    index_shards([str(path)[: -len(".index")] for path in left], **options)  # whole: all fresh
    index_shards(shards, **options)
    for shard in shards:
        index = load(shard, layout=Layout(Kind.text), tokenizer=tokenizer)
        held = ids.StoredIds.of(f"{shard}.tokens", index, tokenizer.ids)
        assert len(index) == 30
        for number in range(30):
            (text,) = held.texts(number, index=index, store=LOCAL)
            assert text is not None
            assert len(tokenizer.decode(list(map(int, text)))) > 0


def compressed(directory: Path, *, suffix: str) -> SourceConfig:
    """Three files of lines, one of them in several frames."""
    for shard in range(3):
        data = b"\n".join(text_lines(seed=shard))
        parts = [data] if shard else [data[:1000], b"", data[1000:]]
        packed = b"".join(PACK[suffix](part) for part in parts) if suffix else data
        (directory / f"x-{shard}.jsonl{suffix}").write_bytes(packed)
    pattern = f"{directory}/x-*.jsonl{suffix}"
    shards = find_shards(pattern, key="k", store=LOCAL)
    index_shards(shards, layout=LAYOUT, tokenizer=corpora.tokenizer_path())
    return SourceConfig(Kind.text, pattern, pattern, 1.0, text_field="text")


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_lines_give_the_batches_of_plain_ones(suffix: str, tmp_path: Path) -> None:
    found = []
    for name in (suffix, ""):
        directory = tmp_path / f"of{name}"
        directory.mkdir()
        source = compressed(directory, suffix=name)
        assert len(list(directory.glob("*.tokens"))) == (3 if name else 0)
        found.append(batches(corpora.config(sources={"only": source})))
        texts = tokenizer_command._texts(LAYOUT, directory / f"x-1.jsonl{name}")
        assert list(texts) == [json.loads(line)["text"] for line in text_lines(seed=1)]
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.document, theirs.document)
        told = [[key.replace(suffix, "") for key in row] for row in mine.keys]
        assert told == theirs.keys


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_that_breaks_off_keeps_its_whole_lines(
    suffix: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Cut anywhere, or damaged in the middle: a beginning of the documents, and a reason."""
    noise = np.random.default_rng(0)
    lines = [json.dumps({"text": noise.bytes(3000).hex()}).encode() for _ in range(150)]
    whole = PACK[suffix](b"\n".join(lines) + b"\n")
    path = tmp_path / f"x.jsonl{suffix}"
    kept = set()
    for cut in range(10, len(whole), len(whole) // 12):
        path.write_bytes(whole[:cut])
        report = validate([path], layout=LAYOUT)
        documents = report.sums["documents"]
        kept.add(documents)
        assert report.defects["cut_short"] == 1
        if not documents:
            continue
        with (tmp_path / "tokens").open("wb") as tokens:
            found = index_shard(path, layout=LAYOUT, tokenizer=tokenizer, tokens=tokens)
        assert [found.key(i) for i in range(len(found))] == [
            f"{n:08d}" for n in range(1, documents + 1)
        ]
        reasons = [reason for reason, _ in found.dropped]
        assert reasons in (["truncated", "unreadable_tail"], ["unreadable_tail"])
    assert len(kept) > 2
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(60) + whole[middle + 60 :])
    report = validate([path], layout=LAYOUT)
    assert report.defects["unreadable_tail"] + report.defects["cut_short"] == 1
    assert report.sums["documents"] < 150
    path.write_bytes(whole + b"what is this")
    report = validate([path], layout=LAYOUT)
    assert (report.defects, report.sums["documents"]) == ({"unreadable_tail": 1}, 150)
    path.write_bytes(b"<html>")
    assert validate([path], layout=LAYOUT).defects == {"not_compressed": 1}
    with pytest.raises(UserError, match="is not compressed as its name says"):
        index_shards([path], layout=LAYOUT, tokenizer=tokenizer.path)
    with pytest.raises(UserError, match=r"kind text only, not interleaved; make tars of it with"):
        index_shards([path], layout=Layout(Kind.interleaved), tokenizer=tokenizer.path)


@pytest.mark.skipif(servers.NGINX is None, reason=servers.NO_NGINX)
@pytest.mark.parametrize("cached", [False, True])
def test_token_ids_are_read_from_urls(cached: bool, tmp_path: Path) -> None:
    """Compressed lines with all that belongs to them on a web server; then made here."""
    home, files = tmp_path / "nginx", tmp_path / "files"
    home.mkdir()
    files.mkdir()
    source = compressed(files, suffix=".zst")
    expected = batches(corpora.config(sources={"only": source}))
    with servers.nginx(files, home=home) as address:
        urls = f"{address}/x-{{0..2}}.jsonl.zst"
        there = replace(source, train=urls, held_out=urls)
        places = {"index_dir": str(tmp_path / "indexes"), "read_tries": 3}
        cache = {"cache_dir": str(tmp_path / "cache")} if cached else {}
        config = corpora.config(sources={"only": there}, **places, **cache)
        assert are_equal(batches(config, workers=2), expected)
        assert len(list((tmp_path / "cache").glob("*.copy"))) == 3 * cached
        for path in files.glob("*.tokens"):
            path.unlink()
        with pytest.raises(UserError, match=r"zst\.tokens does not exist or may not .*--st"):
            batches(replace(config, cache_dir=None))
        shards = find_shards(urls, key="k", store=LOCAL)
        tool = Store(index_dir=places["index_dir"])
        index_shards(shards, layout=LAYOUT, tokenizer=corpora.tokenizer_path(), store=tool)
        assert len(list((tmp_path / "indexes").rglob("*.tokens"))) == 3
        assert are_equal(batches(config), expected)
