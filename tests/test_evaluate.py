"""Held-out losses: the mean over kinds, the same on any split, and images that change owners."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from data.loader import held_out_batches
from nmm import evaluate
from nmm.config import DataConfig, Kind, ModelConfig
from nmm.errors import UserError
from nmm.held_out import HeldOut
from nmm.image_gap import image_gap, with_images_of_others
from nmm.log import read_rows
from nmm.model import build
from nmm.trained import Trained, read_run
from tests import corpora, runs

CPU = torch.device("cpu")
MODEL = ModelConfig(width=32, depth=1, heads=2, vocab_size=corpora.VOCAB_SIZE, image=corpora.IMAGE)


def test_the_loss_is_the_same_however_it_is_split_over_processes() -> None:
    data, model = corpora.config(), build(MODEL, seed=0)
    corpus = corpora.open_corpus(data, split="held_out")
    rows = []
    for size, micro_batch in ((1, 6), (2, 2), (3, 1)):
        sums = HeldOut.zeros(MODEL, num_sources=3, device=CPU)
        for rank in range(size):
            for _, batches in held_out_batches(
                corpus, data, rows_per_source=6, micro_batch=micro_batch, rank=rank, world=size
            ):
                for batch in batches:
                    sums.add(model, batch)
        rows.append(sums.row(corpus, units=()))
    assert rows[1] == pytest.approx(rows[0], rel=1e-6)
    assert rows[2] == pytest.approx(rows[0], rel=1e-6)
    kinds = [rows[0][f"loss/kind/{kind.value}"] for kind in corpora.KINDS]
    assert rows[0]["loss"] == pytest.approx(sum(kinds) / 3)
    assert rows[0]["loss/kind/caption"] == rows[0]["loss/source/caption"]


def test_a_source_without_held_out_shards_is_not_evaluated() -> None:
    data, model = corpora.config(), build(MODEL, seed=0)

    def losses(data: DataConfig) -> dict:
        corpus = corpora.open_corpus(data, split="held_out")
        sums = HeldOut.zeros(MODEL, num_sources=len(corpus.sources), device=CPU)
        for _, batches in held_out_batches(corpus, data, rows_per_source=6, micro_batch=2):
            for batch in batches:
                sums.add(model, batch)
        return sums.row(corpus, units=())

    whole = losses(data)
    sources = dict(data.sources)
    sources["caption"] = dataclasses.replace(sources["caption"], held_out=None)
    part = losses(dataclasses.replace(data, sources=sources))
    assert {key for key in whole if key not in part} == {
        "loss/source/caption",
        "loss/kind/caption",
    }
    assert part["loss/source/text"] == pytest.approx(whole["loss/source/text"], rel=1e-12)
    assert part["loss"] == pytest.approx(
        (whole["loss/kind/interleaved"] + whole["loss/kind/text"]) / 2
    )


def test_every_image_gets_the_pixels_of_another_document() -> None:
    """Pixels are replaced by the number of their document, so that owners can be read off them."""
    data = corpora.config()
    corpus = corpora.open_corpus(data, split="held_out")
    compared = 0
    for _, batches in held_out_batches(corpus, data, rows_per_source=6, micro_batch=3):
        for batch in batches:
            owner = torch.zeros(len(batch.pixels), dtype=torch.uint8)
            numbers = torch.arange(3)[:, None] * 40 + batch.document
            shown = batch.image > 0
            owner[batch.image[shown].long() - 1] = numbers[shown].to(torch.uint8)
            marked = dataclasses.replace(
                batch, pixels=owner[:, None, None, None].expand(batch.pixels.shape)
            )
            swapped = with_images_of_others(marked)
            if swapped is None:
                continue
            moved = swapped.pixels[:, 0, 0, 0]
            assert sorted(moved.tolist()) == sorted(owner.tolist())  # none lost
            assert not (moved == owner).any()
            compared += len(owner)
    assert compared > 20


def test_a_batch_with_images_of_one_document_only_is_left_out() -> None:
    data = corpora.config()
    corpus = corpora.open_corpus(data, split="held_out")
    story = corpora.KINDS.index(corpora.Kind.interleaved)
    [(_, _), (_, batches), _] = held_out_batches(corpus, data, rows_per_source=1, micro_batch=1)
    batch = next(batches)
    alone = dataclasses.replace(
        batch,
        document=batch.document.where(batch.document == 1, 0),
        image=batch.image.where(batch.document == 1, 0),
    )
    alone.pixels = batch.pixels[: int(alone.image.max())]
    assert story == 1
    assert with_images_of_others(alone) is None


@pytest.fixture
def trained() -> Trained:
    return read_run(runs.undisturbed(), device=CPU)


def test_the_image_gap_is_the_loss_of_captions_before_and_after_a_swap(trained: Trained) -> None:
    corpus = trained.open_held_out()
    own, other = image_gap(trained, corpus, rows_per_source=4)
    last = read_rows(runs.undisturbed() / "evals.jsonl")[-1]
    assert own == pytest.approx(last["loss/source/caption"], rel=1e-5)
    by_hand = HeldOut.zeros(MODEL, num_sources=len(corpus.sources), device=CPU)
    for source, (_, batches) in zip(
        corpus.sources, trained.held_out_batches(corpus, rows_per_source=4), strict=True
    ):
        for batch in batches if source.kind is Kind.caption else ():
            turned = [batch.pixels[-1:], batch.pixels[:-1]]  # a caption has one image
            swapped = dataclasses.replace(batch, pixels=torch.cat(turned))
            by_hand.add(trained.model, swapped)
    assert other == pytest.approx(by_hand.tally.loss(), rel=1e-6)
    assert other != pytest.approx(own, rel=1e-4)


def test_a_model_that_does_not_look_has_no_image_gap(trained: Trained) -> None:
    with torch.no_grad():
        trained.model.patch.weight.zero_()
    own, other = image_gap(trained, trained.open_held_out(), rows_per_source=4)
    assert own == other


def test_an_image_gap_without_captions_is_refused(trained: Trained) -> None:
    corpus = trained.open_held_out()
    others = [source for source in corpus.sources if source.kind is not Kind.caption]
    with pytest.raises(UserError, match=r"--image-gap found no two held-out documents of kind cap"):
        image_gap(trained, dataclasses.replace(corpus, sources=others), rows_per_source=4)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


def test_the_command_prints_the_losses_of_the_last_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--run", runs.undisturbed(), "--image-gap", "--json")
    printed = json.loads(capsys.readouterr().out)
    last = read_rows(runs.undisturbed() / "evals.jsonl")[-1]
    losses = {
        key: value for key, value in last.items() if key.startswith(("loss", "step", "dropped"))
    }
    gap = {key: printed.pop(key) for key in ("caption/own_images", "caption/other_images")}
    assert printed == pytest.approx(losses, rel=1e-4)
    assert gap["caption/own_images"] == pytest.approx(losses["loss/source/caption"], rel=1e-4)
    command(monkeypatch, "--run", runs.undisturbed(), "--rows-per-source", 4)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.endswith(f"step {runs.STEPS}: held-out loss in nats per token")
    table = {key: float(value) for key, value in map(str.split, lines)}
    assert table == pytest.approx({k: v for k, v in losses.items() if k != "step"}, abs=2e-4)


def test_a_run_is_evaluated_on_the_documents_of_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of one with captions alone, the first source: their loss is as before, and the only one."""
    text = (runs.undisturbed() / "config.yaml").read_text()
    other = OmegaConf.create(text)
    for kind in ("interleaved", "text"):
        del other.data.sources[kind]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(other))
    command(monkeypatch, "--run", runs.undisturbed(), "--data-of", tmp_path, "--json")
    printed = json.loads(capsys.readouterr().out)
    last = read_rows(runs.undisturbed() / "evals.jsonl")[-1]
    assert {key for key in printed if key.startswith("loss/source/")} == {"loss/source/caption"}
    assert printed["loss"] == pytest.approx(last["loss/source/caption"], rel=1e-4)
    other.data.units = {"speech": 5}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(other))
    with pytest.raises(
        SystemExit, match=r"^error: --data-of is \S+, whose tokenizer or data.units"
    ):
        command(monkeypatch, "--run", runs.undisturbed(), "--data-of", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--run", "RUN", "--masked", "--image-gap"],
            r"^error: --masked scores .* give one of them",
        ),
        (["--run", "NONE"], r"^error: \S+none/config.yaml does not exist; give the directory of a"),
        (["--run", "UNTRAINED"], r"^error: \S+untrained has no complete checkpoint; train it"),
        (["--run", "NONE", "--rows-per-source", "0"], r"^error: --rows-per-source is 0; set it to"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "untrained").mkdir()
    shutil.copy(runs.undisturbed() / "config.yaml", tmp_path / "untrained")
    places = {"NONE": tmp_path / "none", "UNTRAINED": tmp_path / "untrained"}
    places["RUN"] = runs.undisturbed()
    with pytest.raises(SystemExit, match=said) as refusal:
        command(monkeypatch, *(places.get(word, word) for word in arguments))
    assert "\n" not in str(refusal.value)
