"""A late-fusion run from the command line: a given, frozen encoder, and what the run writes."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from nmm.config import compose, load
from nmm.flops import num_parameters
from nmm.model import build
from nmm.trained import read_run
from tests import runs

LATE = (
    "run.name=late",
    "model.image.kind=encoder",
    "model.vision.width=16",
    "model.vision.depth=2",
    "model.vision.heads=2",
    "optim.vision_rate_multiplier=0",
    "schedule.warmup_steps=0",
    "schedule.cooldown_steps=0",
    "log.wandb=off",
    "data.workers=0",
)


def test_a_run_with_a_given_frozen_encoder(tmp_path: Path) -> None:
    """It keeps the encoder to the bit, counts its FLOPs, and goes on without the file."""
    given = tmp_path / "encoder.safetensors"
    late = (*LATE, f"weights.vision={given}")

    def asked(steps: int, *more: str) -> list[str]:
        words = (*late, f"schedule.total_steps={steps}", "checkpoint.every_steps=3", *more)
        return runs.overrides(runs.corpus(), tmp_path, *words)

    config = load(compose(asked(3))).model
    donor = {n: p.detach() for n, p in build(config, seed=9).named_parameters()}
    save_file(donor, given)
    done = runs.one_after_the_other([asked(3), asked(6), asked(3, "run.name=new")], remove=[given])
    assert done.stdout.count("finished") == 2, done.stderr
    assert done.stdout.count("continuing") == 1
    assert "run.name=new" in done.stderr.splitlines()[-1]
    assert f"weights.vision is {given}, which does not exist" in done.stderr

    trained = read_run(tmp_path / "late", device=torch.device("cpu"))
    assert trained.step == 6
    for name, p in trained.model.named_parameters():
        assert torch.equal(p, donor[name]) == name.startswith("vision."), name

    sizes = num_parameters(config)
    rows = runs.rows(tmp_path / "late" / "losses.jsonl")
    for row in rows:
        images = row["tokens/modality/image"]
        assert row["flops"] == 6 * (sizes.N_vision * images + sizes.N_text * row["tokens"])
        assert 0 < images < row["tokens"]
    manifest = json.loads((tmp_path / "late" / "manifest.json").read_text())
    assert (manifest["N"], manifest["N_vision"]) == (sizes.N, sizes.N_vision)
