"""The totals of a folder in one file say what its indexes say, or are not used."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data import folder, index
from data.corpus import Corpus
from data.folder import ShardTotals, Table
from data.index import load
from data.indexing import index_shard
from data.layout import Reader
from data.plan import plan_rows
from data.prepare.index import index_shards
from data.store import TOTALS, Store
from data.tokenizer import Tokenizer
from nmm.config import DataConfig, Kind, Layout, SourceConfig
from nmm.errors import UserError
from tests import corpora, servers
from tests import test_units as units
from tests.test_json_lines import LAYOUT, text_lines


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The corpus of all tests, whose folders have their totals."""
    directory = shutil.copytree(corpora.corpus_directory(), tmp_path / "corpus")
    assert len(list(directory.rglob(TOTALS))) == 3
    return directory


def told(corpus: Corpus) -> list:
    """All that is known of a corpus before an index is opened."""
    names = ("text_tokens", "images", "skipped_images", "tokens", "longest")
    sums = [[getattr(source, name) for name in names] for source in corpus.sources]
    counts = [source.documents_of_shards.tolist() for source in corpus.sources]
    return [corpus.fingerprint, sums, counts]


def read_a_row(corpus: Corpus, config: DataConfig) -> None:
    for row, _ in islice(plan_rows(corpus, config), 1):
        for piece in row:
            Reader(corpus, seed=0).read(piece)


def test_a_corpus_opens_without_its_indexes(copy: Path) -> None:
    """What is known is the same, and no index is read for it."""
    config = corpora.config(copy)
    expected = told(corpora.open_corpus(config))
    for path in copy.rglob("*.index"):
        path.write_bytes(bytes(path.stat().st_size))
    corpus = corpora.open_corpus(config)
    assert told(corpus) == expected
    with pytest.raises(UserError, match=r"\.tar\.index is damaged; run"):
        read_a_row(corpus, config)
    for path in copy.rglob(TOTALS):
        path.unlink()
    with pytest.raises(UserError, match=r"\.tar\.index is damaged; run"):
        corpora.open_corpus(config)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def garble(path: Path) -> None:
    path.write_bytes(b"garbage")


def another_format(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 9', 1))


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip, garble, another_format])
def test_damaged_totals_are_not_used(damage: Callable[[Path], None], copy: Path) -> None:
    config = corpora.config(copy)
    expected = told(corpora.open_corpus(config))
    for path in copy.rglob(TOTALS):
        damage(path)
        assert Table.load(path) is None
    assert told(corpora.open_corpus(config)) == expected


def test_a_row_must_fit_its_shard_and_its_index(copy: Path, tokenizer: Tokenizer) -> None:
    """A changed shard, an index that is gone or of another size, another layout or tokenizer."""
    config = corpora.config(copy)
    shard = copy / "text" / "train-000001.tar"
    stored = Path(f"{shard}.index")
    whole = stored.read_bytes()
    stored.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar has no index; run"):
        corpora.open_corpus(config)
    stored.write_bytes(whole[:-64])
    with pytest.raises(UserError, match=r"train-000001\.tar\.index is damaged; run"):
        corpora.open_corpus(config)
    stored.write_bytes(whole)
    before = told(corpora.open_corpus(config))
    data = shard.read_bytes()
    shard.write_bytes(data + bytes(512))
    with pytest.raises(UserError, match="is stale: its shard size in bytes is"):
        corpora.open_corpus(config)
    shard.write_bytes(data)
    other = {"text": replace(config.sources["text"], text_field="body")}
    with pytest.raises(UserError, match="its text_field is None, now it is body"):
        corpora.open_corpus(replace(config, sources=other))
    model = corpora.train_tokenizer(copy / "other.model", vocab_size=320)
    with pytest.raises(UserError, match="is stale: its tokenizer is"):
        corpora.open_corpus(replace(config, tokenizer=str(model)))
    assert told(corpora.open_corpus(config)) == before
    longer = corpora.write_tar(shard, [("a.txt", b"another text. " * 99)])
    index_shard(longer, layout=Layout(Kind.text), tokenizer=tokenizer).save(longer)
    assert told(corpora.open_corpus(config)) != before  # one row is passed over, the others serve


def test_an_index_of_the_same_size_with_other_contents_is_noticed(
    copy: Path, tokenizer: Tokenizer
) -> None:
    config = corpora.config(copy)
    for shard in (copy / "caption").glob("train-*.tar"):
        stored = load(shard, layout=Layout(Kind.caption), tokenizer=tokenizer)
        other = replace(stored, crc=stored.crc ^ 1)
        totals = replace(stored.totals, digest=index._digest(vars(other)))
        replace(other, totals=totals).save(shard)
    corpus = corpora.open_corpus(config)
    with pytest.raises(UserError, match=rf"another result; .* delete {copy}/caption/index\.to"):
        read_a_row(corpus, config)


def test_runs_of_the_index_tool_complete_each_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Rows of other shards stay, those of the same are replaced; each says what its index says."""
    options: dict = {"layout": Layout(Kind.interleaved), "tokenizer": tokenizer.path}
    for name in ("b", "a", "long-name"):
        corpora.write_shards(
            tmp_path, kind=Kind.interleaved, name=name, documents=30, per_shard=10, seed=len(name)
        )
        index_shards(sorted(tmp_path.glob(f"{name}-*.tar")), **options)
    story = b'{"texts": ["a"], "images": [null]}'
    index_shards([corpora.write_tar(tmp_path / "a-000001.tar", [("x.json", story)])], **options)
    table = Table.load(tmp_path / TOTALS)
    assert table is not None
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert [name.decode() for name in table.columns["name"].tolist()] == [
        Path(shard).name for shard in shards
    ]
    found = totals_of(tmp_path, layout=Layout(Kind.interleaved), tokenizer=tokenizer)
    assert found.documents.tolist() == [10, 1, 10, 10, 10, 10, 10, 10, 10]


def totals_of(directory: Path, *, layout: Layout, tokenizer: Tokenizer) -> ShardTotals:
    """With the file of the folder, which must say what the indexes say without it."""
    shards = sorted(str(path) for path in directory.glob("*.tar"))
    sizes = [Path(shard).stat().st_size for shard in shards]
    given: dict = {"layout": layout, "tokenizer": tokenizer, "image_tokens": 16, "store": Store()}
    found = folder.read(shards, sizes, **given)
    (directory / TOTALS).unlink()
    for name, column in vars(folder.read(shards, sizes, **given)).items():
        assert np.array_equal(column, vars(found)[name]), name
    return found


@pytest.mark.parametrize("name", units.LAYOUTS)
def test_totals_of_units(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    units.write(tmp_path)
    layout, directory = units.LAYOUTS[name], tmp_path / name
    index_shards(sorted(directory.glob("*.tar")), layout=layout, tokenizer=tokenizer.path)
    found = totals_of(directory, layout=layout, tokenizer=tokenizer)
    assert bool(found.unit_tokens.any()) == (found.largest_unit.max() >= 0) == (name != "text")


@pytest.mark.skipif(servers.NGINX is None, reason=servers.NO_NGINX)
def test_indexes_of_urls_are_fetched_when_they_are_needed(tmp_path: Path) -> None:
    """With published totals; without, all of them at once."""
    home, files = tmp_path / "nginx", tmp_path / "files"
    home.mkdir()
    files.mkdir()
    for shard in range(30):
        (files / f"x-{shard:02d}.jsonl").write_bytes(b"\n".join(text_lines(seed=shard)))
    shards = sorted(files.glob("*.jsonl"))
    index_shards(shards, layout=LAYOUT, tokenizer=corpora.tokenizer_path())
    fetched = []
    with servers.nginx(files, home=home) as address:
        urls = f"{address}/x-{{00..29}}.jsonl"
        source = SourceConfig(Kind.text, urls, urls, 1.0, text_field="text")
        for number in range(2):
            indexes = tmp_path / f"indexes{number}"
            config = corpora.config(
                sources={"only": source}, index_dir=str(indexes), window_documents=16
            )
            corpus = corpora.open_corpus(config)
            fetched.append(len(list(indexes.rglob("*.jsonl.index"))))
            read_a_row(corpus, config)
            fetched.append(len(list(indexes.rglob("*.jsonl.index"))))
            (files / TOTALS).unlink(missing_ok=True)
    assert fetched == [0, 8, 30, 30]
