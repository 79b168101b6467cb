"""Exports: weights, configuration and tokenizer come back to the bit, and nothing else can be."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from nmm import evaluate, export
from nmm.batch import Modality
from nmm.config import (
    Config,
    ExpertGroups,
    GivenWeights,
    ImageKind,
    ModelConfig,
    MoEConfig,
    Routing,
    ScheduleConfig,
)
from nmm.errors import UserError
from nmm.generate.__main__ import main as generate_command
from nmm.model import build, check_given, load_given
from nmm.trained import WEIGHTS, Trained, read_export, read_run
from tests import corpora, runs

CPU = torch.device("cpu")
FILES = {
    *("config.json", "config.yaml", "export.json", "generation_config.json", "model.safetensors"),
    *("modeling_nmm.py", "processing_nmm.py", "processor_config.json", "tokenizer.model"),
    "tokenizer_config.json",
}


def untrained(tokenizer: Path | None = None, **model: object) -> Trained:
    """A small model of these keys, as if it had been trained."""
    values = {"width": 32, "depth": 2, "heads": 2, "vocab_size": 512, "image": corpora.IMAGE}
    built = ModelConfig(**{**values, **model})
    data = corpora.config(corpora.scratch(), tokenizer=str(tokenizer or corpora.tokenizer_path()))
    if built.image.kind is ImageKind.none:
        data.sources = {"text": data.sources["text"]}
    config = Config(model=built, data=data, schedule=ScheduleConfig(total_steps=9))
    return Trained(
        config=config,
        model=build(config.model, seed=5).eval(),
        tokenizer=Tokenizer(config.data.tokenizer),
        name="small",
        step=9,
        tokens=90,
    )


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def test_a_run_comes_back_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.undisturbed()
    export.main(["--run", str(run), "--out", str(tmp_path / "new" / "out")])
    out = tmp_path / "new" / "out"
    assert "it is the same to the bit" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "config.yaml").stat().st_mode}
    expected, found = read_run(run, device=CPU), read_export(out, device=CPU)
    assert_same_bits(dict(found.model.state_dict()), dict(expected.model.state_dict()))
    assert (found.name, found.step, found.tokens) == ("whole", expected.step, expected.tokens)
    assert found.tokens == runs.rows(run / "losses.jsonl")[-1]["tokens"]
    assert replace(found.config.data, tokenizer="") == replace(expected.config.data, tokenizer="")
    assert found.config.model == expected.config.model
    assert (out / "tokenizer.model").read_bytes() == corpora.tokenizer_path().read_bytes()


def test_nothing_in_it_is_pickled(tmp_path: Path) -> None:
    """Pickles begin with 0x80 or lie in zip files, which begin with PK."""
    export.write_export(untrained(), tmp_path / "out")
    begins = {path.name: path.read_bytes()[:2] for path in (tmp_path / "out").iterdir()}
    assert [name for name, begin in begins.items() if begin[:1] == b"\x80" or begin == b"PK"] == []
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[8:]
    assert json.JSONDecoder().raw_decode(header.decode("latin1"))[0]["__metadata__"] == {
        "format": "pt"
    }


def test_bf16_is_the_rounded_weight_and_half_the_size(tmp_path: Path) -> None:
    trained = untrained()
    export.write_export(trained, tmp_path / "whole")
    export.write_export(trained, tmp_path / "half", dtype=torch.bfloat16)
    rounded = {n: w.bfloat16() for n, w in trained.model.state_dict().items()}
    assert_same_bits(load_file(tmp_path / "half" / "model.safetensors"), rounded)
    found = read_export(tmp_path / "half", device=CPU).model.state_dict()
    assert_same_bits(dict(found), {name: weight.float() for name, weight in rounded.items()})
    whole, half = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")
    )
    assert half / whole == pytest.approx(0.5, abs=0.03)


def test_the_comparison_finds_every_difference(tmp_path: Path) -> None:
    """One bit of a weight, a weight that is gone, another config, another tokenizer."""
    trained = untrained()
    trained.model.norm.weight.data[3] = torch.nan  # not equal to itself, and yet the same
    export.write_export(trained, tmp_path / "out")
    weights = {n: w.clone() for n, w in trained.model.state_dict().items()}
    path, out = tmp_path / "out" / "model.safetensors", tmp_path / "out"
    assert export.differences(trained, weights, out) == []
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert export.differences(trained, weights, out) == ["patch.weight"]
    fewer = {n: w for n, w in weights.items() if n != "norm.weight"}
    save_file(fewer, path)
    assert export.differences(trained, weights, out) == ["norm.weight"]
    save_file({**weights, "norm.weight": weights["norm.weight"].double()}, path)
    assert export.differences(trained, weights, out) == ["norm.weight"]
    save_file(weights, path)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("width: 32", "width: 64"))
    corpora.train_tokenizer(out / "tokenizer.model", vocab_size=310)
    assert export.differences(trained, weights, out) == ["config.yaml", "tokenizer.model"]


def test_what_reads_a_run_reads_its_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, picture = runs.undisturbed(), tmp_path / "out", tmp_path / "a.jpg"
    export.main(["--run", str(run), "--out", str(out), "--step", "295"])
    picture.write_bytes(corpora.jpeg(np.random.default_rng(0)))
    said: dict[str, list[str]] = {"generate": [], "evaluate": []}
    capsys.readouterr()
    for which in (["--run", str(run), "--step", "295"], ["--export", str(out)]):
        prompt = ["--image", str(picture), "--prompt", "two", "--max-tokens", "8"]
        generate_command([*which, *prompt])
        said["generate"].append(capsys.readouterr().out)
        monkeypatch.setattr("sys.argv", ["evaluate", *which, "--json"])
        evaluate.main()
        said["evaluate"].append(capsys.readouterr().out)
    assert len(set(said["generate"])) == len(set(said["evaluate"])) == 1
    assert json.loads(said["evaluate"][0])["step"] == 295
    out.rename(tmp_path / "moved")
    generate_command(["--export", str(tmp_path / "moved"), *prompt])
    assert capsys.readouterr().out == said["generate"][0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--run", "NONE", "--out", "NEW"], r"none/config.yaml does not exist; give the directory"),
        (["--run", "RUN", "--out", "FULL"], r"--out is \S+full, which is not empty; give another"),
        (["--run", "RUN", "--out", "FILE"], r"--out is \S+file, which cannot be written \(Not a d"),
        (["--run", "RUN", "--out", "FILE/x"], r"--out is \S+file/x, which cannot be written"),
        (
            ["--run", "RUN", "--out", "NEW", "--step", "1"],
            r"--step is 1 but .* steps 295, 300; giv",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_sentence(
    tmp_path: Path, arguments: list[str], error: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    places = {"RUN": str(runs.undisturbed())}
    given = [
        places.get(word, str(tmp_path / word.lower()) if word.isupper() or "/" in word else word)
        for word in arguments
    ]
    with pytest.raises(SystemExit, match=f"^error: .*{error}") as refusal:
        export.main(given)
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "left by a kill").touch()
    (tmp_path / "out").mkdir()
    export.write_export(untrained(), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_was_begun_is_removed(tmp_path: Path) -> None:
    """The tokenizer is the last of the files that are copied, and this one is gone."""
    trained = untrained()
    trained.tokenizer.path = str(tmp_path / "lost")
    with pytest.raises(UserError, match=r"--out is \S+out, which cannot be written \(No such"):
        export.write_export(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tied_head", [False, True])
def test_an_export_gives_weights_to_another_run(tmp_path: Path, tied_head: bool) -> None:
    """Its file is one that weights.decoder takes; a tied head is in it once."""
    trained = untrained(tied_head=tied_head)
    export.write_export(trained, tmp_path / "out")
    given = GivenWeights(decoder=str(tmp_path / "out" / "model.safetensors"))
    model = build(trained.config.model, seed=6)
    check_given(trained.config.model, given, tokenizer_hash="")
    load_given(model, given)
    of_decoder = {n: p for n, p in model.named_parameters() if n != "patch.weight"}
    expected = dict(trained.model.named_parameters())
    assert_same_bits(of_decoder, {name: expected[name] for name in of_decoder})
    assert ("head.weight" in load_file(given.decoder or "")) != tied_head
    read = read_export(tmp_path / "out", device=CPU).model
    assert (read.head.weight is read.embedding.weight) == tied_head
    assert torch.equal(read.head.weight, trained.model.head.weight)


def parts_of(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, by what the format says: a length, a header, the numbers."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    places = {name: x["data_offsets"] for name, x in header.items() if name != "__metadata__"}
    return {name: data[begin + first : begin + last] for name, (first, last) in places.items()}


MODALITY_EXPERTS = MoEConfig(Routing.modality_groups, groups=ExpertGroups(text=3, image=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_expert_is_a_tensor_under_its_number(tmp_path: Path, dtype: torch.dtype) -> None:
    trained, out = untrained(moe=MODALITY_EXPERTS), tmp_path / "out"
    export.write_export(trained, out, dtype=dtype)
    written = load_file(out / "model.safetensors")
    facts = json.loads((out / "export.json").read_text())
    assert facts["experts"] == ["text", "text", "text", "image", "image"]
    parameters = {n: w.detach().to(dtype) for n, w in trained.model.named_parameters()}
    whole = dict(parameters)
    for layer in range(2):
        for matrix in ("w1", "w2", "w3"):
            stacked = whole.pop(f"blocks.{layer}.ffn.experts.{matrix}")
            whole |= {f"blocks.{layer}.ffn.experts.{e}.{matrix}": stacked[e] for e in range(5)}
    assert_same_bits(written, whole)
    sums = {n: hashlib.sha256(x).hexdigest() for n, x in parts_of(out / WEIGHTS).items()}
    assert facts["weights_sha256"] == sums
    found = dict(read_export(out, device=CPU).model.state_dict())
    assert_same_bits(found, {name: weight.float() for name, weight in parameters.items()})


def test_an_expert_is_computed_from_its_tensors_alone(tmp_path: Path) -> None:
    """As somebody would who knows nothing but the names."""
    trained = untrained(moe=MoEConfig(Routing.modality_hard, groups=ExpertGroups(text=1, image=1)))
    export.write_export(trained, tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS)
    layer = trained.model.get_submodule("blocks.1.ffn")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for number, modality in enumerate([Modality.text, Modality.image]):
        w1, w2, w3 = (written[f"blocks.1.ffn.experts.{number}.w{i}"] for i in (1, 2, 3))
        expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        found = layer(x[None], torch.full((1, 4), int(modality)))
        assert torch.allclose(found[0][0], expected, rtol=1e-5, atol=1e-7)


def test_experts_are_given_to_another_run(tmp_path: Path) -> None:
    trained = untrained(moe=MODALITY_EXPERTS)
    export.write_export(trained, tmp_path / "out")
    path = tmp_path / "out" / WEIGHTS
    given, model = GivenWeights(decoder=str(path)), build(trained.config.model, seed=6)
    check_given(trained.config.model, given, tokenizer_hash="")
    load_given(model, given)
    expected = dict(trained.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]) == (name != "patch.weight"), name
    weights, one = load_file(path), "blocks.0.ffn.experts.3.w2"
    odd = {"gone": None, "other": torch.ones(3, 3), "whole": weights[one].int()}
    said = ["lacks blocks.0.ffn.experts.w2 and has", r"experts.w2 of shape \[5\]", "w2 as I32"]
    for (name, value), message in zip(odd.items(), said, strict=True):
        changed = {**weights, one: value}
        save_file({n: w for n, w in changed.items() if w is not None}, tmp_path / name)
        with pytest.raises(UserError, match=message):
            check_given(
                trained.config.model,
                GivenWeights(decoder=str(tmp_path / name)),
                tokenizer_hash="",
            )


def test_a_weight_that_changed_is_named(tmp_path: Path) -> None:
    """One bit of an expert, or two experts in each other's place."""
    export.write_export(untrained(moe=MODALITY_EXPERTS), tmp_path / "out")
    path = tmp_path / "out" / WEIGHTS
    whole = path.read_bytes()
    names = [f"blocks.1.ffn.experts.{number}.w3" for number in (0, 4)]
    one, other = (parts_of(path)[name] for name in names)
    for changed in (
        whole.replace(other, other[:-1] + bytes([other[-1] ^ 1])),
        whole.replace(other, one),
    ):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=rf"damaged \({names[1]} has another sha256 than in "):
            read_export(tmp_path / "out", device=CPU)
    path.write_bytes(whole)
    read_export(tmp_path / "out", device=CPU)


def damaged(out: Path, file: str, *, damage: str) -> None:
    path = out / file
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "format":
        path.write_text(path.read_text().replace('"format": 2', '"format": 9'))
    elif damage == "other":
        corpora.train_tokenizer(path, vocab_size=310)
    else:
        weights = load_file(path)
        save_file({n: w for n, w in weights.items() if n != "norm.weight"}, path)


@pytest.mark.parametrize(
    ("file", "damage", "error"),
    [
        ("export.json", "gone", r"export.json does not exist; give a folder that `python -m nmm"),
        ("export.json", "empty", r"export.json cannot be read \(Expecting value.*; export the run"),
        ("export.json", "format", r"export.json is not of format 2, which this version reads;"),
        ("config.yaml", "gone", r"config.yaml does not exist;"),
        ("tokenizer.model", "gone", r"tokenizer.model, which cannot be read \(No such file"),
        ("tokenizer.model", "other", r"tokenizer.model, which is not the one that the model was"),
        ("model.safetensors", "gone", r"model.safetensors is damaged \(.*No such file"),
        ("model.safetensors", "cut", r"model.safetensors is damaged \(.*; export the run again"),
        ("model.safetensors", "fewer", r"model.safetensors is damaged \(.*; export the run again"),
    ],
)
def test_a_damaged_export_is_refused_in_a_sentence(
    tmp_path: Path, file: str, damage: str, error: str
) -> None:
    out = shutil.copytree(whole_export(), tmp_path / "out")
    damaged(out, file, damage=damage)
    with pytest.raises(UserError, match=error) as refusal:
        read_export(out, device=CPU)
    assert "\n" not in str(refusal.value)


def whole_export() -> Path:
    """Once per session."""
    directory = corpora.scratch() / "export"
    if not directory.exists():
        export.write_export(untrained(), directory)
    return directory


def test_an_export_has_no_steps() -> None:
    with pytest.raises(SystemExit, match=r"^error: --step is 3 but an export has one step only;"):
        generate_command(["--export", str(whole_export()), "--step", "3", "--prompt", "a"])


def test_a_run_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Its ids would mean other texts."""
    run = shutil.copytree(runs.undisturbed(), tmp_path / "run")
    other = corpora.train_tokenizer(tmp_path / "other.model", vocab_size=310)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(corpora.tokenizer_path()), str(other)))
    with pytest.raises(UserError, match=r"other.model, which is not the one that the model was tr"):
        read_run(run, device=CPU)
