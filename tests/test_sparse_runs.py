"""Runs with experts from the command line: trained, resumed, evaluated, exported, continued."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from nmm import evaluate, export
from nmm.config import ExpertGroups, MoEConfig, Routing, compose, load
from nmm.errors import UserError
from nmm.flops import num_parameters
from nmm.generate.__main__ import main as generate_command
from nmm.generate.sampling import Sampling
from nmm.generate.text import check_prompts, generate
from nmm.trained import read_run
from tests import corpora, runs
from tests.test_export import untrained
from tests.test_rundir import BY_LAYER, documented_keys, general

SPARSE = (
    "model.moe.routing=token_choice",
    "model.moe.experts=4",
    "model.moe.hidden=32",
    "schedule.warmup_steps=0",
    "schedule.cooldown_steps=0",
    "log.wandb=off",
    "log.signals_every_steps=2",
    "data.workers=0",
)


def test_a_run_is_resumed_exported_and_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(name: str, steps: int) -> None:
        more = (*SPARSE, f"run.name={name}", f"schedule.total_steps={steps}")
        done = runs.run(runs.command(runs.corpus(), tmp_path, *more, "checkpoint.every_steps=2"))
        assert "finished" in done.stdout, done.stdout + done.stderr

    train("once", 4)
    train("twice", 2)
    train("twice", 4)
    logs = [runs.rows(tmp_path / name / "losses.jsonl") for name in ("once", "twice")]
    assert logs[0] == logs[1]
    last = logs[0][-1]
    check_signals(logs[0], depth=2)
    assert last["moe/dropped_fraction"] == 0
    assert 1 <= last["moe/balance"] < 4
    assert 0 < last["moe/entropy"] < 1.3863

    config = load(compose(runs.overrides(runs.corpus(), tmp_path, *SPARSE))).model
    sizes = num_parameters(config)
    manifest = json.loads((tmp_path / "once" / "manifest.json").read_text())
    assert (manifest["N"], manifest["N_active"]) == (sizes.N, sizes.N_active)
    assert manifest["N"] > manifest["N_active"]
    assert last["flops"] == 6 * sizes.N_active * last["tokens"]

    out = tmp_path / "out"
    export.main(["--run", str(tmp_path / "once"), "--out", str(out)])
    assert "transformers does not read it" in capsys.readouterr().out
    assert not (out / "modeling_nmm.py").exists()
    said = []
    for which in (["--run", str(tmp_path / "once")], ["--export", str(out)]):
        generate_command([*which, "--prompt", "a red", "--max-tokens", "4"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    trained = read_run(tmp_path / "once", device=torch.device("cpu"))
    row = evaluate._evaluate(trained, rows_per_source=None, with_gap=False, masked=False)
    logged = runs.rows(tmp_path / "once" / "evals.jsonl")[-1]
    assert row["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert "causal" not in row
    check_the_command_of_experts(tmp_path / "once", capsys)


def check_signals(log: list[dict], *, depth: int) -> None:
    """Every second row has those of every layer and modality, and nothing that is not documented.

    Loads of a token's one expert add up to 1; the whole of a row is some KiB.
    """
    for row in log:
        found = {key for key in row if key.startswith(BY_LAYER)}
        expected = {
            f"signals/{number}/{layer}/{kind}"
            for number in ("load", "dropped_fraction", "entropy")
            for layer in range(depth)
            for kind in ("text", "image")
        } | {f"signals/router_grad_norm/{layer}" for layer in range(depth)}
        assert found == (expected if row["step"] % 2 == 0 else set())
        assert {general(key) for key in found} <= documented_keys("losses.jsonl")
        for key in (key for key in found if key.startswith("signals/load/")):
            assert sum(row[key]) == pytest.approx(1, abs=1e-3)
        assert all(row[key] > 0 for key in found if "grad_norm" in key or "entropy" in key)
        assert len(json.dumps(row)) < 8 * 2**10


def check_the_command_of_experts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["--run", str(run), "--experts"])
    said = capsys.readouterr().out
    with (run / "specialisation.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert [line["layer"] for line in scores if line["kind"] == "all"] == ["0", "1"]
    assert f"{float(scores[0]['specialisation']):.4f}" in said
    loads = Counter[tuple[str, str, str]]()
    with (run / "experts.csv").open() as file:
        for line in csv.DictReader(file):
            loads[line["kind"], line["layer"], line["modality"]] += float(line["load"])
    assert ("caption", "1", "image") in loads
    assert loads == {key: pytest.approx(1) for key in loads}
    with Image.open(run / "experts.png") as picture:
        assert picture.size[0] > 1000
    with pytest.raises(SystemExit, match=r"^error: --experts writes tables and a pic.*--json was"):
        evaluate.main(["--run", str(run), "--experts", "--json"])


def test_expert_choice_is_evaluated_as_not_causal_and_writes_nothing() -> None:
    moe = MoEConfig(Routing.expert_choice, groups=ExpertGroups(text=2, image=2), group_rows=3)
    trained = untrained(moe=moe)
    held_out = corpora.config()
    trained.config.data.sources = held_out.sources
    row = evaluate._evaluate(trained, rows_per_source=4, with_gap=False, masked=False)
    assert row["causal"] is False
    assert row["loss"] > 0
    with pytest.raises(UserError, match=r"model.moe.routing is expert_choice.*tokens to come"):
        check_prompts(
            [["a"]],
            tokenizer=trained.tokenizer,
            model=trained.config.model,
            max_tokens=1,
            context_tokens=99,
        )


def test_modality_experts_write_text_with_those_of_text() -> None:
    """Another expert for images changes nothing after a prompt of text."""
    moe = MoEConfig(Routing.modality_hard, groups=ExpertGroups(text=1, image=1))
    trained = untrained(moe=moe)
    written = []
    for factor in (1, 5):
        for block in trained.model.blocks:
            block.ffn.experts.w2.data[1] *= factor
        prompts = [["once"], ["a red one", "b"]]
        written.append(
            generate(
                trained.model,
                prompts,
                tokenizer=trained.tokenizer,
                max_tokens=6,
                sampling=Sampling(temperature=1.0),
            )
        )
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=tiny_moma", "model.moe.groups.image=0"], "corpus also holds image; set model.moe"),
        (["model=tiny_moma", "model.moe.groups.code=2"], "no source of data.sources holds code"),
        (["model=moma_4t4i_90m"], "model.image.kind is codes"),
    ],
)
def test_groups_that_do_not_fit_the_corpus_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(compose([*overrides, "schedule.total_steps=1"]))
