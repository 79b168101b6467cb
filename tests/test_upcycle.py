"""Runs whose experts begin as the feed-forward layers of another run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nmm import parent
from nmm.batch import Modality, PackedBatch
from nmm.checkpoint import newest
from nmm.config import ExpertGroups, ModelConfig, MoEConfig, ParentMode, Routing
from nmm.errors import UserError
from nmm.model import Model, build
from nmm.model.layers import Fed
from nmm.parallel import World
from nmm.scaling.eta import eta
from nmm.scaling.runs import points_of, read_runs
from nmm.trained import read_run
from nmm.upcycle import seeds
from tests import runs
from tests.runs import rows
from tests.sparse import SPARSE
from tests.test_parent import plan_and_begin
from tests.train_cases import launch

POINT, MORE = 4, 5  # steps of a seed, and of what is made of it
SWIN = ("model.norm=rms", "model.norm_position=swin", "model.norm_eps=1e-12")
ONE_EACH = ("model.moe.routing=modality_hard", "model.moe.groups={text:1,image:1}")
FOUR_EACH = ("model.moe.routing=expert_choice", "model.moe.groups={text:4,image:4}")
EIGHT = ("model.moe.routing=expert_choice", "model.moe.experts=8")


def overrides(directory: Path, name: str, *more: str, steps: int = POINT) -> list[str]:
    return runs.overrides(
        runs.corpus(),
        directory,
        f"run.name={name}",
        "log.wandb=off",
        "data.workers=0",
        f"schedule.total_steps={steps}",
        "schedule.warmup_steps=0",
        "schedule.cooldown_steps=0",
        "checkpoint.keep_steps=[4]",
        *SWIN,
        *(word.replace("=AT/", f"={directory}/") for word in more),
    )


def child_of(seed: str) -> tuple[str, ...]:
    return (f"parent.run=AT/{seed}", f"parent.step={POINT}", "parent.mode=upcycle")


NEW = ("optim.learning_rate=1e-3", "run.seed=3", "schedule.warmup_steps=1")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds, one of which went on, and a run with experts made of each."""
    directory = tmp_path_factory.mktemp("upcycle")
    noise = "model.moe.gumbel_noise=true"
    launch(
        [
            overrides(directory, "hard", *ONE_EACH, steps=POINT + MORE),
            overrides(directory, "dense"),
            overrides(directory, "4t4i", *FOUR_EACH, *child_of("hard"), *NEW, noise, steps=MORE),
            overrides(directory, "8x", *EIGHT, *child_of("dense"), steps=MORE),
        ],
        directory=directory,
    )
    return directory


def test_it_reads_the_next_batches_and_counts_on(directory: Path) -> None:
    """With a schedule and a learning rate of its own, from its own first step on."""
    seed, child = (rows(directory / name / "losses.jsonl") for name in ("hard", "4t4i"))
    assert [row["step"] for row in child] == [1, 2, 3, 4, 5]
    assert {row["lr"] for row in child} == {1e-3}
    same = [key for key in seed[0] if key.startswith(("tokens", "documents", "pieces", "dropped"))]
    assert len(same) > 6
    for before, after in zip(seed[POINT:], child, strict=True):
        assert [before[key] for key in same] == [after[key] for key in same]
    manifest = json.loads((directory / "4t4i" / "manifest.json").read_text())
    behind = {key: seed[POINT - 1][key] for key in ("tokens", "flops")}
    where = {"run": str(directory / "hard"), "step": POINT, "mode": "upcycle"}
    assert manifest["parent"] == {**where, **behind}
    dropped = [row["moe/dropped_fraction"] for row in child]  # by four that choose a quarter each
    assert dropped == pytest.approx([0.316] * MORE, abs=0.04)
    assert "with experts made of" in (directory / "4t4i" / "console.log").read_text()


def test_laws_count_what_the_seed_cost(directory: Path) -> None:
    found = read_runs(directory)
    assert {run.directory.name for run in found.finished} == {"hard", "dense", "4t4i", "8x"}
    child = next(run for run in found.finished if run.directory.name == "4t4i")
    seed = rows(directory / "hard" / "losses.jsonl")
    # One expert of each four is active on average: the same FLOPs per token as the seed.
    points = points_of([child], loss="loss")
    assert points.columns["C"] == pytest.approx([seed[-1]["flops"]])
    assert points.columns["D"] == pytest.approx([seed[-1]["tokens"]])


def test_eta_counts_what_the_seed_cost(directory: Path) -> None:
    dense, seed, sparse = (
        [json.loads(line) for line in (directory / name / "losses.jsonl").read_text().splitlines()]
        for name in ("dense", "hard", "4t4i")
    )
    found = eta(directory / "dense", directory / "4t4i")[0]
    assert found.matched_step is not None
    assert found.flops is not None
    assert found.seconds is not None
    assert found.flops < POINT / (POINT + found.matched_step - 1) * 1.1
    last = math.ceil(found.matched_step)
    spent = [[*seed[:POINT], *sparse[:step]] for step in (last - 1, last)]
    flops = [dense[-1]["flops"] / rows[-1]["flops"] for rows in spent]
    assert flops[0] > found.flops >= flops[1] * (1 - 1e-9)
    clock = sum(row["seconds"] for row in dense)
    seconds = [clock / sum(row["seconds"] for row in rows) for rows in spent]
    assert seconds[0] > found.seconds >= seconds[1] * (1 - 1e-9)


@pytest.mark.parametrize(("seed", "child"), [("hard", "4t4i"), ("dense", "8x")])
def test_layers_give_what_the_seeds_gave(
    directory: Path, world: World, seed: str, child: str
) -> None:
    """Behind the norm, on real documents, wherever some expert takes a token; else nothing.

    The norm has a small epsilon, so that only the factor in front of the layers' outputs is new.
    """
    before = read_run(directory / seed, device=world.device, step=POINT)
    after = model_made_of(directory / seed, child=directory / child, world=world)
    batch = next(before.held_out_batches(before.open_held_out(), rows_per_source=2)[0][1])
    for theirs, ours in zip(before.model.blocks, after.blocks, strict=True):
        x = inputs_of(theirs.ffn, model=before.model, batch=batch)
        expected = theirs.ffn_norm(output_of(theirs.ffn, x, batch))
        fed = ours.ffn(x, batch.modality)
        found, taken = ours.ffn_norm(fed.output), (fed.output != 0).any(dim=-1)
        real = batch.modality != Modality.pad
        assert taken[real].float().mean() > 0.3
        assert (~taken[real]).sum() > 10
        torch.testing.assert_close(found[taken & real], expected[taken & real], rtol=0, atol=1e-5)
        assert (found[~taken] == 0).all()


def model_made_of(seed: Path, *, child: Path, world: World) -> Model:
    """The model of `child` as it was before its first step."""
    config = read_run(child, device=world.device).config
    model = build(config.model, seed=config.run.seed)
    checkpoint = seed / "checkpoints" / f"step_{POINT:08d}"
    parent.load_weights(model, checkpoint, mode=ParentMode.upcycle, world=world)
    return model.eval()


def inputs_of(ffn: nn.Module, *, model: Model, batch: PackedBatch) -> Tensor:
    """What a layer reads in a forward pass."""
    seen: list[Tensor] = []
    hook = ffn.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return seen[0]


def output_of(ffn: nn.Module, x: Tensor, batch: PackedBatch) -> Tensor:
    fed = ffn(x, batch.modality)
    assert isinstance(fed, Fed)
    return fed.output


def test_routers_are_new_and_all_else_is_the_seeds(directory: Path, world: World) -> None:
    before = read_run(directory / "hard", device=world.device, step=POINT).model
    model = model_made_of(directory / "hard", child=directory / "4t4i", world=world)
    fresh = dict(build(model.config, seed=3).named_parameters())
    seed = dict(before.named_parameters())
    for name, weight in model.named_parameters():
        if ".router." in name:
            assert torch.equal(weight, fresh[name])
        elif ".experts." in name:
            assert torch.equal(weight, seed[name].repeat_interleave(4, dim=0))
        else:
            assert torch.equal(weight, seed[name])
    assert any(".router." in name for name in fresh)


def test_a_run_that_was_stopped_goes_on_without_its_seed(directory: Path, world: World) -> None:
    words = overrides(directory, "4t4i", *FOUR_EACH, *child_of("hard"), *NEW, steps=MORE + 2)
    (directory / "hard").rename(directory / "away")
    try:
        begun = plan_and_begin([*words, "model.moe.gumbel_noise=true"], world=world)
    finally:
        (directory / "away").rename(directory / "hard")
    assert begun.own == newest(directory / "4t4i")
    assert (begun.progress.step, begun.weights) == (MORE, None)


def test_every_expert_has_one_layer_to_begin_as() -> None:
    hard, dense = SPARSE["hard"], replace(SPARSE["hard"], moe=MoEConfig())
    backwards = MoEConfig(Routing.expert_choice, groups=ExpertGroups(text=1, image=2))
    assert seeds(hard, config=replace(hard, moe=backwards)) == [0, 1, 1]
    assert seeds(dense, config=replace(hard, moe=backwards)) == [0, 0, 0]
    assert seeds(dense, config=SPARSE["token choice"]) == [0] * 4
    assert seeds(dense, config=hard) == [0, 0]


def sparse(**changes: object) -> ModelConfig:
    return replace(SPARSE["groups"], **changes)


@pytest.mark.parametrize(
    ("seed", "config", "said"),
    [
        ("groups", sparse(), r"parent has the experts {'text': 2, 'image': 3}, so that it is not"),
        ("token choice", sparse(), r"parent has the experts {'all': 4}"),
        ("hard", SPARSE["token choice"], r"has experts for all modalities, but .* text and image"),
        (
            "hard",
            sparse(moe=MoEConfig(Routing.modality_groups, groups=ExpertGroups(text=2, code=2))),
            r"has experts for code, but the parent has layers for text and image only",
        ),
        ("hard", sparse(ffn_hidden=48), r"inner size 48, but .* have 40; set model.moe.hidden=40"),
    ],
)
def test_a_seed_that_does_not_fit_is_refused(seed: str, config: ModelConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        seeds(SPARSE[seed], config=config)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("model.depth=3",), r"model.depth is 3 but .* was made with 2; give the value of the par"),
        (("model.norm_position=pre",), r"model.norm_position is pre but .* was made with swin"),
        (("data.seed=1",), r"data.seed is 1 but .* was made with 0"),
        (("data.global_rows=16",), r"data.global_rows is 16 but .* was made with 8"),
        (("model.moe.hidden=48",), r"inner size 48, but .* have 256; set model.moe.hidden=256"),
        (("weights.decoder=x",), r"parent.mode is upcycle and weights.\* names x"),
        (
            ("model.moe.routing=none", "model.moe.groups={text:0,image:0}"),
            r"parent.mode is upcycle and model.moe.routing is none",
        ),
        (  # enough for these steps, and not for those of the seed before them
            ("data.sources.text.max_epochs=1", "schedule.total_steps=106"),
            r"schedule needs 112,640 tokens but the corpus serves 111,086",
        ),
    ],
)
def test_what_does_not_fit_the_parent_is_refused(
    directory: Path, world: World, asked: tuple[str, ...], said: str
) -> None:
    words = overrides(directory, "new", *FOUR_EACH, *child_of("hard"), *asked)
    with pytest.raises(UserError, match=said) as refusal:
        plan_and_begin(words, world=world)
    assert "\n" not in str(refusal.value)
    assert not (directory / "new").exists()
