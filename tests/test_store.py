"""Shards behind real servers, some of which fail on purpose, give the batches of local shards."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch

from data import store
from data.corpus import find_shards
from data.layout import read_document
from data.loader import Loader
from data.prepare import index as index_command
from data.prepare.index import index_shards
from data.prepare.validate import validate
from data.store import Store
from nmm.batch import PackedBatch
from nmm.config import DataConfig, Kind, Layout
from nmm.errors import UserError
from tests import corpora, servers

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
needs_nginx = pytest.mark.skipif(servers.NGINX is None, reason=servers.NO_NGINX)
PARTS = {"train": "train-{000000..000004}.tar", "held_out": "held_out-{000000..000001}.tar"}


@dataclass(frozen=True)
class Origin:
    """Where the test corpus is served: by S3, by S3 behind the faulty proxy, and as http."""

    s3: str
    proxy: servers.FaultyProxy

    def http(self, name: str = "") -> str:
        return f"{self.proxy.address}/{servers.BUCKET}/{name}"


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    """All shards and their indexes in an S3 bucket."""
    with servers.s3() as endpoint, servers.faulty_proxy(endpoint) as proxy:
        public = {"s3_additional_kwargs": {"ACL": "public-read"}}
        system = fsspec.filesystem("s3", **s3_settings(endpoint), **public)
        system.put(f"{corpora.corpus_directory()}/", servers.BUCKET, recursive=True)
        yield Origin(endpoint, proxy)


def s3_settings(endpoint: str) -> dict:
    return {"endpoint_url": endpoint, "key": "any", "secret": "any"}


@pytest.fixture
def through(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> Origin:
    """S3 is asked through the faulty proxy, which has no fault to make yet."""
    monkeypatch.setitem(fsspec.config.conf, "s3", s3_settings(origin.proxy.address))
    origin.proxy.fail("busy", count=0, match="")
    return origin


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """nginx before the test corpus."""
    home = tmp_path_factory.mktemp("nginx")
    with servers.nginx(corpora.corpus_directory(), home=home) as address:
        yield address


@pytest.fixture(params=["http", "s3"])
def root(request: pytest.FixtureRequest, through: Origin) -> str:
    """The test corpus as URLs of each kind, through the faulty proxy."""
    return through.http().rstrip("/") if request.param == "http" else f"s3://{servers.BUCKET}"


def at(root: str, directory: Path, **changes: object) -> DataConfig:
    """The config of the test corpus with its shards at `root`; everything local in `directory`."""
    config = corpora.config()
    sources = {
        name: replace(source, **{s: f"{root}/{name}/{part}" for s, part in PARTS.items()})
        for name, source in config.sources.items()
    }
    quick = {"read_tries": 3, "read_timeout_seconds": 20.0, "index_dir": str(directory / "indexes")}
    return replace(config, sources=sources, **{**quick, **changes})


def batches(config: DataConfig, *, workers: int = 0) -> list[PackedBatch]:
    corpus = corpora.open_corpus(config)
    loader = Loader(corpus, config, rank=0, world=1, micro_batch=4, workers=workers)
    return [batch for step, _ in islice(loader, STEPS) for batch in step]


def assert_equal(found: list[PackedBatch], expected: list[PackedBatch]) -> None:
    assert len(found) == len(expected) == 2 * STEPS
    for mine, theirs in zip(found, expected, strict=True):
        for column in fields(PackedBatch):
            a, b = getattr(mine, column.name), getattr(theirs, column.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, column.name


@pytest.fixture(scope="module")
def local() -> list[PackedBatch]:
    return batches(corpora.config())


@pytest.mark.parametrize("cached", [False, True])
def test_batches_from_urls_are_those_of_local_files(
    cached: bool, root: str, local: list[PackedBatch], tmp_path: Path
) -> None:
    cache = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    config = at(root, tmp_path, **cache)
    assert_equal(batches(config, workers=2), local)
    assert len(list((tmp_path / "indexes").rglob("*.tar.index"))) == 15
    assert any((tmp_path / "cache").glob("*.copy")) == cached


def test_a_process_reads_on_while_its_workers_read(root: str, tmp_path: Path) -> None:
    """Connections of a process are of no use to the processes that it forks."""
    config = at(root, tmp_path)
    corpus, here = corpora.open_corpus(config), corpora.open_corpus(corpora.config())
    assert corpus.fingerprint == here.fingerprint
    steps = iter(Loader(corpus, config, rank=0, world=1, micro_batch=4, workers=2))
    for number in range(STEPS):
        next(steps)
        for ours, theirs in zip(corpus.sources, here.sources, strict=True):
            mine = read_document(ours.shards[number], 0)
            assert mine == read_document(theirs.shards[number], 0)


@needs_nginx
@pytest.mark.parametrize("place", ["", "/crowded"])
def test_batches_from_nginx(place: str, web: str, local: list[PackedBatch], tmp_path: Path) -> None:
    """Also from a server that answers 503 to what comes too fast."""
    config = at(f"{web}{place}", tmp_path, read_tries=10, cache_dir=str(tmp_path / "cache"))
    found = batches(config)
    assert found[0].keys == local[0].keys
    assert_equal(found, local)


@needs_nginx
@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("busy", "status 503 Service Temporarily Unavailable), after 2 tries"),
        ("whole", "the server ignores ranges and sends the whole file), after 2 tries"),
        ("slow", "no answer in time), after 2 tries"),
        ("nothing", "does not exist or may not be read (status 404 Not Found)"),
    ],
)
def test_what_nginx_refuses_is_one_sentence(place: str, sentence: str, web: str) -> None:
    url = f"{web}/{place}/text/train-000000.tar"
    with pytest.raises(UserError) as caught:
        Store(tries=2, timeout_seconds=0.2).read(url, start=0, stop=1024)
    assert str(caught.value).startswith(url)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


FAULTS = {
    "busy": r"503|SlowDown",
    "truncate": r"[Nn]ot enough data|payload",
    "shift": r"bytes 512-2047 were asked for, the answer is 'bytes 0-1535/",
    "whole": r"ignores ranges|bytes came for bytes 512-2047",
    "stall": r"[Tt]imeout|no answer in time",
    "drop": r"[Dd]isconnected|[Cc]onnection",
}


@pytest.mark.parametrize(
    ("root", "kind"),
    # s3fs does not tell the range of an answer; there a checksum finds the wrong one, see below.
    [(root, kind) for kind in FAULTS for root in ("http", "s3") if (root, kind) != ("s3", "shift")],
    indirect=["root"],
)
def test_faults_within_the_tries_change_nothing_and_beyond_stop_the_run(
    kind: str, root: str, through: Origin
) -> None:
    path = "text/train-000000.tar"
    expected = (corpora.corpus_directory() / path).read_bytes()[512:2048]
    store = Store(tries=3, timeout_seconds=0.3)
    through.proxy.fail(kind, count=2, match=path)
    assert store.read(f"{root}/{path}", start=512, stop=2048) == expected
    assert through.proxy.state()["left"] == 0
    through.proxy.fail(kind, count=9, match=path)
    with pytest.raises(UserError) as caught:
        store.read(f"{root}/{path}", start=512, stop=2048)
    # The HTTP client asks once more by itself when a connection that was open before is closed.
    most = 6 if kind == "drop" else 3
    assert 3 <= 9 - through.proxy.state()["left"] <= most
    assert str(caught.value).startswith(f"{root}/{path} cannot be read (")
    assert re.search(FAULTS[kind], str(caught.value))
    assert "after 3 tries; bring the storage back" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_bytes_are_found_by_their_checksum(
    root: str, through: Origin, local: list[PackedBatch], tmp_path: Path
) -> None:
    """An answer with other bytes than it says, and a copy in the cache that is not the shard."""
    config = at(root, tmp_path)
    corpus = corpora.open_corpus(config)
    shard, mine = corpus.sources[2].shards[0], corpora.open_corpus(corpora.config()).sources[2]
    expected = read_document(mine.shards[0], 3)
    through.proxy.fail("lie", count=1, match=shard.name)
    assert read_document(shard, 3) == expected
    assert through.proxy.state()["left"] == 0

    config = replace(config, cache_dir=str(tmp_path / "cache"))
    shard = corpora.open_corpus(config).sources[2].shards[0]
    assert read_document(shard, 3) == expected
    (copy,) = (tmp_path / "cache").glob("*.copy")
    copy.write_bytes(bytes(copy.stat().st_size))
    assert read_document(shard, 3) == expected
    copy.unlink(missing_ok=True)
    assert read_document(shard, 4) == read_document(mine.shards[0], 4)
    copy.write_bytes(copy.read_bytes()[:1024])
    assert read_document(shard, 3) == expected


def test_a_shard_that_changed_at_its_url_stops_the_run(
    root: str, origin: Origin, tmp_path: Path
) -> None:
    config = at(root, tmp_path, cache_dir=str(tmp_path / "cache"))
    shard = corpora.open_corpus(config).sources[2].shards[0]
    first = int(shard.index.start[0])
    damaged = replace(shard, index=replace(shard.index, start=shard.index.start + 512))
    with pytest.raises(
        UserError, match=rf"^{shard.path} has changed since it was .* {first + 512}"
    ):
        read_document(damaged, 0)


def test_urls_are_indexed_like_files(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Nothing is published beside these, and the index of the command goes to --index-dir."""
    pattern = f"{root}/caption/train-{{000000..000002}}.tar"
    tool = Store(index_dir=str(tmp_path))
    shards = find_shards(pattern, key="--shards", store=tool)
    index_command.main(
        ["--kind", "caption", "--shards", pattern, "--tokenizer", str(corpora.tokenizer_path()),
         "--index-dir", str(tmp_path), "--force", "--workers", "2"]
    )  # fmt: skip
    assert "documents                           75" in capsys.readouterr().out
    here = [corpora.corpus_directory() / "caption" / store.name_of(url) for url in shards]
    for url, shard in zip(shards, here, strict=True):
        made = tool.index_path(url)
        assert made.read_bytes() == Path(f"{shard}.index").read_bytes()
        made.unlink()
        assert tool.find_index(url).read_bytes() == Path(f"{shard}.index").read_bytes()
    tokenizer = str(corpora.tokenizer_path())
    with pytest.raises(UserError, match=rf"^{shards[0]} holds no document of kind interleaved"):
        index_shards(shards[:1], layout=Layout(Kind.interleaved), tokenizer=tokenizer, store=tool)


def test_urls_are_validated_like_files(root: str) -> None:
    names = [f"text/train-{number:06d}.tar" for number in range(2)]
    urls = validate([f"{root}/{name}" for name in names], layout=Layout(Kind.text), workers=2)
    here = validate([corpora.corpus_directory() / name for name in names], layout=Layout(Kind.text))
    assert (urls.sums, urls.findings) == (here.sums, here.findings)
    wrong = validate([f"{root}/{names[0]}"], layout=Layout(Kind.caption))
    assert wrong.defects["missing_image"] == 25
    assert {finding.shard for finding in wrong.findings} == {f"{root}/{names[0]}"}


def test_patterns_name_files_and_urls(through: Origin, tmp_path: Path) -> None:
    texts = [f"text/train-{number:06d}.tar" for number in range(5)]
    tool = Store(tries=1)
    for base in (f"s3://{servers.BUCKET}", str(corpora.corpus_directory())):
        expected = [f"{base}/{name}" for name in texts]
        for pattern in (
            "text/train-*.tar",
            "text/train-{000000..000004}.tar",
            "te?t/train-00000[0-4].tar",
        ):
            assert find_shards(f"{base}/{pattern}", key="k", store=tool) == expected
        assert (
            find_shards(f"{base}/text/{{train,held_out}}-*.tar", key="k", store=tool)[2:]
            == expected
        )
        missing = find_shards(f"{base}/text/train-{{000000..000005}}.tar", key="k", store=tool)
        with pytest.raises(UserError, match=r"^\S*text/train-000005\.tar [^\n]*correct its name"):
            tool.sizes(missing)
    http = through.http("text/train-{000003..000004}.tar")
    assert find_shards(http, key="k", store=tool) == [through.http(name) for name in texts[3:]]
    sizes = [(corpora.corpus_directory() / name).stat().st_size for name in texts]
    assert tool.sizes([through.http(name) for name in texts]) == sizes
    urls = [f"s3://{servers.BUCKET}/{name}" for name in texts]
    assert tool.sizes(urls * 20) == tool.sizes(urls) * 20 == sizes * 20  # listed, asked one by one


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("https://host/train-*.tar", "web servers do not list files; use a brace range"),
        ("s3://bucket/train-{0..3.tar", "whose braces do not match"),
        ("ftp://host/{0..3}.tar", "has the scheme ftp; use one of http, https, s3, gs"),
        ("s3://bucket/{0..3}.zip", "matches no shard"),
    ],
)
def test_wrong_patterns_are_refused(pattern: str, sentence: str) -> None:
    tool = Store(tries=1)
    with pytest.raises(UserError) as caught:
        tool.sizes(find_shards(pattern, key="data.sources.a.train", store=tool))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_url_needs_its_package_and_a_place_for_its_index() -> None:
    """In a process whose imports of these packages fail, as where they are not installed."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['aiohttp', 's3fs', 'gcsfs']))\n"
        "from data.store import Store\n"
        "for url in sys.argv[1:]:\n"
        "    try: Store().size(url)\n"
        "    except ValueError as error: print(error)\n"
    )
    urls = ["https://host/x.tar", "s3://bucket/x.tar", "gs://bucket/x.tar"]
    run = [sys.executable, "-W", "error", "-c", code, *urls]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, url, package in zip(said, urls, ("aiohttp", "s3fs", "gcsfs"), strict=True):
        assert line.startswith(f"{url} needs the package {package}, which is not installed; run")
    with pytest.raises(UserError, match=r"x\.tar is a URL and data\.index_dir is null; set it"):
        Store().find_index("s3://bucket/x.tar")


def test_nobody_at_the_address_is_one_sentence() -> None:
    with pytest.raises(
        UserError, match=r"^http://127.0.0.1:1/x.tar cannot be read \(Connect call failed"
    ):
        Store(tries=2).read("http://127.0.0.1:1/x.tar", start=0, stop=9)
