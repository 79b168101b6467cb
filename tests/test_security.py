"""What others wrote is read and never run; what is secret is in no file; paths stay where they are.

Every hostile file here holds a pickle that makes a folder, and is first shown to be one.
"""

import ast
import base64
import json
import os
import pickle
import subprocess
import sys
from io import BytesIO
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from webdataset.autodecode import basichandlers

from data.corpus import Corpus
from data.loader import Loader
from data.prepare.convert.__main__ import main as convert
from data.prepare.index import index_shards
from data.prepare.validate import validate
from data.store import Store
from nmm import report
from nmm.codes.model import read as read_codes
from nmm.config import Kind, Layout, SourceConfig, compose, compose_study, load, read_yaml
from nmm.credentials import masked
from nmm.errors import UserError
from nmm.intact import damage_of
from nmm.model.folder import weight_files
from nmm.pieces import Piece, Share, Stored, Written, path_of, write_pieces, write_shares
from tests import corpora, runs, servers
from tests.test_structure import our_modules

SECRET = "s3cr3t-0f-s0meb0dy"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.makedirs, (self.folder, 0o777, True)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder that is there when a hostile file was run."""
    return tmp_path / "was-run"


def hostile(trap: Path) -> dict[str, bytes]:
    """The same trap in every form that some reader runs, by extension."""
    buffer = BytesIO()
    torch.save(Payload(trap), buffer)
    array = BytesIO()
    np.save(array, np.array([Payload(trap)], object), allow_pickle=True)
    plain = pickle.dumps(Payload(trap))
    text = f"!!python/object/apply:os.makedirs ['{trap}']".encode()
    pickles = dict.fromkeys(("pyd", "pickle", "pkl", "mp", "cbor", "tb"), plain)
    tensors = dict.fromkeys(("pt", "pth", "ckpt"), buffer.getvalue())
    return {**pickles, **tensors, "npy": array.getvalue(), "yaml": text}


def hostile_shard(path: Path, trap: Path) -> Path:
    """Captions beside every hostile member, and hostile bytes as image, text, layout and units."""
    rng = np.random.default_rng(0)
    members = []
    for number in range(30):
        members += [
            (f"{number}.jpg", corpora.jpeg(rng)),
            (f"{number}.txt", corpora.sentence(rng, 5).encode()),
        ]
        members += [(f"{number}.{name}", data) for name, data in hostile(trap).items()]
    for name, data in hostile(trap).items():
        members += [(f"image-{name}.jpg", data), (f"image-{name}.txt", b"text")]
        members += [(f"text-{name}.jpg", corpora.jpeg(rng)), (f"text-{name}.txt", data)]
        members += [(f"units-{name}.txt", b"text"), (f"units-{name}.units.npy", data)]
    return corpora.write_tar(path, members)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_nothing_in_a_shard_is_run(tmp_path: Path, trap: Path) -> None:
    """By indexing, validating, training and converting; webdataset's own decoding runs it."""
    shard = hostile_shard(tmp_path / "train-0.tar", trap)
    layout = Layout(Kind.caption)
    index_shards([shard], layout=layout, tokenizer=corpora.tokenizer_path())
    validate([str(shard)], layout=layout)
    source = SourceConfig(kind=Kind.caption, train=str(shard), held_out=str(shard), weight=1.0)
    data = corpora.config(sources={"caption": source})
    corpus = Corpus.open(data, image=corpora.IMAGE, vocab_size=corpora.VOCAB_SIZE, split="train")
    loader = Loader(corpus, data, rank=0, world=1, micro_batch=8, workers=0)
    steps = (step for step, _ in islice(loader, 5))
    keys = {key.partition("/")[2] for step in steps for batch in step for key in batch.flat_keys}
    assert keys >= {*map(str, range(30)), "text-yaml"}
    convert(["captions-tar", "--input", str(shard), "--out", str(tmp_path / "out")])
    assert len([*(tmp_path / "out").glob("train-*.tar")]) == 1
    assert not trap.exists()
    for name in ("pyd", "pickle", "pkl"):
        basichandlers(f".{name}", hostile(trap)[name])
        trap.rmdir()


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, trap: Path) -> None:
    """Every reader of checkpoints gets its numbers from `Stored`: resume, parent, evaluate, ..."""
    piece = Piece("weight", start=0, offset=0, numel=4)
    share = Share({"weight": torch.ones(4)}, [piece])
    write_shares(tmp_path, [share], process=0)
    shapes, files = {"weight": [4]}, [[[piece]]]
    written = Written(1, 1, ["weight"], processes=1, zero_stage=1, shapes=shapes, files=files)
    write_pieces(tmp_path, written)
    assert torch.equal(dict(Stored(tmp_path).weights())["weight"], torch.ones(4))
    torch.save({"0/weight": Payload(trap)}, path_of(tmp_path, 0))
    with pytest.raises(UserError, match=r"is damaged.*Weights only"), damage_of(tmp_path):
        dict(Stored(tmp_path).weights())
    assert not trap.exists()
    torch.load(path_of(tmp_path, 0), weights_only=False)
    assert trap.exists()


def unsafe_calls(name: str, tree: ast.Module) -> list[str]:
    """What of a module could run what it reads; peers of benchmarks read what they wrote."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *(n.name for n in node.names)]
            names = {module.partition(".")[0] for module in modules}
            if names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}:
                found.append(f"{name} imports {', '.join(modules)}")
        if isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
            safe = {
                "torch.load": "weights_only=True",
                "np.load": "allow_pickle=False",
                "np.save": "allow_pickle=False",
                "yaml.load": "Loader=yaml.CSafeLoader",
            }
            if called in ("eval", "exec") or safe.get(called, "") not in ("", *options):
                found.append(f"{name} calls {ast.unparse(node)}")
            if any("shell=True" in option for option in options):
                found.append(f"{name} calls a shell")
    return found


def test_no_module_has_a_way_to_run_what_it_reads() -> None:
    """UnpicklingError is the name of torch's refusal."""
    modules = our_modules()
    found = [
        said
        for name, tree in modules.items()
        if not name.startswith("bench.peers")
        for said in unsafe_calls(name, tree)
    ]
    assert found == ["nmm.intact imports pickle, UnpicklingError"]
    wrong = "import pickle; torch.load(a); np.load(a, allow_pickle=True); yaml.load(a, yaml.Loader)"
    assert len(unsafe_calls("x", ast.parse(f"{wrong}; eval(a); run(a, shell=True)"))) == 6


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("https://user:password@host/a.tar cannot", "https://***@host/a.tar cannot"),
        ("'s3://key:p@ss@bucket/a' and https://t0ken@h", "'s3://***@bucket/a' and https://***@h"),
        ("https://user:pa/ss@host/a", "https://***@host/a"),
        ("https://h/a.tar?part=1&X-Amz-Signature=ab#c", None),
        ("https://h/a?x=1&sig=a%2Fb&y=2", "https://h/a?x=1&sig=***&y=2"),
        ("https://h:8080/a@b.tar?download=true", "https://h:8080/a@b.tar?download=true"),
        ("s3://bucket/train-{000..009}.tar of a@b.org", None),
    ],
)
def test_credentials_are_masked_in_what_is_said(said: str, told: str | None) -> None:
    expected = said.replace("Signature=ab", "Signature=***") if told is None else told
    assert masked(said) == expected
    assert str(UserError(said)) == expected


URL = f"https://user:{SECRET}@host/a-{{0..9}}.tar"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"data.sources.caption.train='{URL}'"],
        [f"data.tokenizer='https://host/a?sig={SECRET}'"],
        [f"data.sources.caption.trian='{URL}'"],
        [f"data.global_rows='{URL}'"],
        [f"data.sources.caption.train='{URL}"],  # no closing quote
        ["data.sources.caption.train=${oc.env:NMM_TEST_URL}"],
    ],
)
def test_a_secret_in_the_configuration_is_refused_without_a_word_of_it(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NMM_TEST_URL", URL)
    with pytest.raises(UserError) as caught:
        load(compose([*overrides, "schedule.total_steps=1"]))
    assert SECRET not in str(caught.value)
    assert "***" in str(caught.value) or "trian" in str(caught.value)
    with pytest.raises(UserError, match=r"study.overrides.0 is .*\*\*\*@host"):
        compose_study(["study=nmm_early", f"study.overrides=[\"data.tokenizer='{URL}'\"]"])
    with pytest.raises(UserError, match=r"--shards is https://\*\*\*@host"):
        Store().expand(URL, key="--shards")


def test_the_configuration_of_somebody_elses_run_cannot_read_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NMM_TEST_SECRET", SECRET)
    path = tmp_path / "config.yaml"
    path.write_text("data: {sources: {a: {held_out: 'https://h/${oc.env:NMM_TEST_SECRET}'}}}")
    with pytest.raises(UserError, match=r"has a reference .* in data.sources.a.held_out") as caught:
        read_yaml(path)
    assert SECRET not in str(caught.value)


def test_paths_stay_where_the_user_wants_them(tmp_path: Path) -> None:
    """Names of runs and studies, indexes of a bucket of others, weights that a folder names."""
    for name in ("..", "a/b", "../a", ""):
        with pytest.raises(UserError, match="give one folder name"):
            load(compose([f"run.name='{name}'", "schedule.total_steps=1"]))
    for name in ("..", "../a", "a/b", ".hidden"):
        with pytest.raises(UserError, match="to be part of a folder"):
            compose_study(["study=nmm_early", f"study.name='{name}'"])
    store = Store(index_dir=str(tmp_path / "indexes"))
    for url in ("s3://bucket/a/../../../b.tar", "s3://../b.tar"):
        with pytest.raises(UserError, match=r"would lie outside of data\.index_dir"):
            store.index_path(url)
    for name in ("../a.safetensors", "/etc/a.safetensors", "..", "sub/a.safetensors"):
        index = {"weight_map": {"embedding.weight": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="which is no file of the folder"):
            weight_files(tmp_path, key="weights.decoder")


def test_a_codebook_names_no_code_of_the_hub(tmp_path: Path) -> None:
    """transformers fetches kernels that a configuration names so, and runs them."""
    small = {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1]}
    named = {"attn_implementation": "a/b", "_attn_implementation": "a/b"}
    facts = {"model_type": "janus_vqgan", **small, **named}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="is missing or of another shape"):
        read_codes(tmp_path, key="data.codebook")  # else an ImportError, or worse


needs_nginx = pytest.mark.skipif(servers.NGINX is None, reason=servers.NO_NGINX)


@needs_nginx
def test_netrc_opens_one_server_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/security.md says; and what is refused is told without the address of a secret."""
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {servers.USER} password {servers.PASSWORD}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"trust_env": True}})
    shard = corpora.corpus_directory() / "text" / "train-000000.tar"
    with servers.nginx(corpora.corpus_directory(), home=tmp_path) as web:
        store = Store(tries=1, timeout_seconds=19.0)  # a connection of its own
        url = f"{web}/locked/text/{shard.name}"
        assert store.read(url, start=0, stop=1024) == shard.read_bytes()[:1024]
        with pytest.raises(UserError, match="status 401 Unauthorized"):
            store.read(url.replace("127.0.0.1", "localhost"), start=0, stop=1024)


@needs_nginx
def test_no_file_and_no_line_of_a_run_holds_a_secret(tmp_path: Path) -> None:
    """A run that reads by http with a password, by signed URLs and by s3, and tells wandb.

    Its credentials come from the environment, where others lie about as well.
    """
    basic = base64.b64encode(f"{servers.USER}:{servers.PASSWORD}".encode()).decode()
    http = {"headers": {"Authorization": f"Basic {basic}"}, "params": {"sig": servers.PASSWORD}}
    keys = {"key": f"key-{SECRET}", "secret": f"secret-{SECRET}"}
    corpus = corpora.corpus_directory()
    with servers.nginx(corpus, home=tmp_path) as web, servers.s3() as endpoint:
        system = fsspec.filesystem("s3", endpoint_url=endpoint, **keys)
        system.put(f"{corpus}/text/", f"{servers.BUCKET}/text/", recursive=True)
        environment = {
            **runs.environment(),
            "FSSPEC_HTTP": json.dumps(http),
            "FSSPEC_S3_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": keys["key"],
            "AWS_SECRET_ACCESS_KEY": keys["secret"],
            **{name: f"{name}-{SECRET}" for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD")},
        }
        places = {
            "caption": f"{web}/locked/caption",
            "interleaved": f"{web}/signed/interleaved",
            "text": f"s3://{servers.BUCKET}/text",
        }
        done = subprocess.run(
            [sys.executable, "train.py", *short_run(tmp_path, places)],
            env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    directory = tmp_path / "runs" / "one"
    report.write(directory)
    held = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    held[Path("console")] = (done.stdout + done.stderr).encode()
    names = {path.name for path in held}
    assert {"config.yaml", "overrides.txt", "manifest.json", "report.html"} <= names
    assert any(path.suffix == ".wandb" for path in held)
    words = [word.encode() for word in (SECRET, servers.PASSWORD, basic)]
    assert [path for path, data in held.items() if any(word in data for word in words)] == []
    told = {path.name for path, data in held.items() if web.encode() in data}
    assert told >= {"config.yaml", "overrides.txt"}  # the search finds what is there


def short_run(folder: Path, places: dict[str, str]) -> list[str]:
    """Overrides of three steps with an evaluation, on the test corpus at other places."""
    shards = {"train": "train-{000000..000004}.tar", "held_out": "held_out-{000000..000001}.tar"}
    small = runs.overrides(corpora.corpus_directory(), folder / "runs")
    return [
        *(word for word in small if not word.startswith("data.sources.")),
        *(
            f"data.sources.{name}.{split}='{place}/{part}'"
            for name, place in places.items()
            for split, part in shards.items()
        ),
        f"data.index_dir={folder}/indexes",
        "data.workers=1",
        "run.name=one",
        "schedule.total_steps=3",
        "log.wandb=offline",
    ]
