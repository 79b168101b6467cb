"""Auxiliary routers: what they compute and learn, that nothing looks ahead, and runs with them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu
from torch.utils.flop_counter import FlopCounterMode

from nmm import evaluate
from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.checkpoint import newest
from nmm.config import ExpertGroups, ModelConfig, MoEConfig, OptimConfig, Routing
from nmm.engine import parameter_groups
from nmm.errors import UserError
from nmm.flops import exact_flops, flops, num_parameters
from nmm.generate.__main__ import main as generate_command
from nmm.model import Group, Model, build, group
from nmm.model.__main__ import describe, memory_plan
from nmm.model.moe import MoE
from nmm.parallel import World
from nmm.pieces import Stored
from nmm.routing import GUESSED, RIGHT, SURPRISE, WANTED, Routed
from nmm.scaling.runs import read_run as read_for_laws
from nmm.trained import read_run
from tests import runs
from tests.batches import Document, pack, random_rows
from tests.family import batch_for
from tests.runs import rows
from tests.sparse import SPARSE
from tests.test_moe import taken_by, tokens_of
from tests.test_parent import plan_and_begin
from tests.train_cases import launch

CPU = torch.device("cpu")
AUXILIARY = {
    name: replace(SPARSE[name], moe=replace(SPARSE[name].moe, auxiliary_routers=True))
    for name in ("expert choice", "moma")
}
BY_NAME = pytest.mark.parametrize("name", AUXILIARY)


def layer_of(config: ModelConfig) -> MoE:
    """The first layer of a model whose routers, of both kinds, tell tokens apart."""
    layer = with_opinions(config).blocks[0].ffn
    assert isinstance(layer, MoE)
    return layer


def with_opinions(config: ModelConfig) -> Model:
    model = build(config, seed=0).eval()
    for name, weight in model.named_parameters():
        if ".router." in name:
            weight.data.mul_(30 if name.endswith("router.weight") else 4)
    return model


def logits_by_hand(layer: MoE, x: Tensor) -> Tensor:
    """[T, E] of equation 3, before the sigmoid."""
    weights = dict(layer.router.auxiliary.named_parameters())
    groups = dict.fromkeys(name.partition(".")[0] for name in weights)
    pairs = [(weights[f"{g}.0.weight"], weights[f"{g}.2.weight"]) for g in groups]
    return torch.cat([silu(x @ first.T) @ second.T for first, second in pairs], dim=1)


def serves(modality: Tensor, config: MoEConfig) -> Tensor:
    """bool[T, E]."""
    columns = []
    for name, experts in config.sizes.items():
        held = modality != Modality.pad if name == "all" else modality == Modality[name]
        columns += [held] * experts
    return torch.stack(columns, dim=1)


@BY_NAME
def test_a_guess_follows_the_formula_and_costs_its_cross_entropy(name: str) -> None:
    config = AUXILIARY[name]
    layer, (x, modality) = layer_of(config), tokens_of(config)
    grouped = modality.reshape(-1, layer.group_rows * x.shape[1])
    flat, may = x.flatten(0, 1).requires_grad_(), serves(modality.flatten(), config.moe)
    found = layer.router(flat, grouped)
    plain = layer_of(SPARSE[name]).router(flat, grouped)
    assert torch.equal(found.slots.token, plain.slots.token)
    assert torch.equal(found.weight, plain.weight)

    wanted = taken_by(found, tokens=len(flat))
    logits = logits_by_hand(layer, flat)
    surprise = -torch.where(wanted, logsigmoid(logits), logsigmoid(-logits)) * may
    expected = (surprise.sum(dim=1) / may.sum(dim=1).clamp(min=1)).sum()
    torch.testing.assert_close(found.auxiliary, expected, rtol=1e-5, atol=1e-5)
    guessed = (logits.sigmoid() > 0.5) & may
    sums = found.statistics.sum(dim=0)
    counts = [wanted.sum(), guessed.sum(), (wanted & guessed).sum()]
    assert [sums[c] for c in (WANTED, GUESSED, RIGHT)] == counts
    torch.testing.assert_close(sums[SURPRISE], expected.detach(), rtol=1e-5, atol=1e-5)

    gradients = torch.autograd.grad(found.auxiliary, [flat, *layer.parameters()], allow_unused=True)
    names = ["x", *(n for n, _ in layer.named_parameters())]
    moved = {n for n, g in zip(names, gradients, strict=True) if g is not None}
    assert moved == {n for n in names if n.startswith("router.auxiliary.")} != set()


@BY_NAME
def test_experts_take_what_is_guessed_with_the_main_routers_weight(name: str) -> None:
    config = AUXILIARY[name]
    layer, (x, modality) = layer_of(config), tokens_of(config)
    grouped = modality.reshape(-1, layer.group_rows * x.shape[1])
    flat = x.flatten(0, 1)
    guessed = (logits_by_hand(layer, flat) > 0) & serves(modality.flatten(), config.moe)
    found = layer.router(flat, grouped, causal=True)
    ends, by_token = found.slots.ends, found.slots.by_token
    expert = torch.searchsorted(ends, torch.arange(len(found.weight)), right=True)
    gate = torch.zeros(guessed.shape).index_put(
        (found.slots.token[by_token], expert[by_token]), found.weight, accumulate=True
    )
    main = (flat @ layer.router.get_parameter("weight").T).sigmoid()
    torch.testing.assert_close(gate, main * guessed)
    assert guessed.any(dim=0).all()
    assert ends[-1] == len(found.weight)
    assert (ends % 16 == 0).all()

    layer.router.auxiliary.requires_grad_(False)
    for weights in layer.router.auxiliary.parameters():
        weights.zero_()  # nobody takes anything, which is the other end
    nothing = layer(x, modality, causal=True)
    assert (nothing.output == 0).all()
    assert nothing.output.shape == x.shape


LONG, SHORT = [[(150,)], [(20, "image", 90)]], [[(30,)]]


@BY_NAME
@pytest.mark.parametrize(
    ("rows", "starts"),
    [(LONG, (20, 40, 90, 128)), (SHORT, (3, 9, 16, 20, 26))],
    ids=["long", "short"],
)
def test_later_tokens_move_what_experts_choose_and_no_bit_of_what_routers_guess(
    name: str, rows: list[list[Document]], starts: tuple[int, ...]
) -> None:
    """The leak of plain expert choice, and its absence: logits of a prefix, one full forward.

    In short rows experts have few tokens, whose products depend on their number.
    """
    config = AUXILIARY[name]
    ways = ((with_opinions(SPARSE[name]), False), (with_opinions(config), True))
    draw, leaks = torch.Generator().manual_seed(1), []
    for start in starts:
        batch = pack(rows, config=config, row_tokens=rows[0][0][0])
        before = [model.logits(batch, causal=causal) for model, causal in ways]
        for _ in range(3):
            later = torch.randint(5, 64, batch.tokens[:, start:].shape, generator=draw)
            is_text = batch.modality[:, start:] == Modality.text
            batch.tokens[:, start:] = torch.where(is_text, later, batch.tokens[:, start:])
            plain, ours = (
                (model.logits(batch, causal=causal) - old).abs()
                for (model, causal), old in zip(ways, before, strict=True)
            )
            leaks.append(plain[0, :start].max())
            assert (ours[0, :start] == 0).all()
            if start >= 40:  # where the image of the second row, which sees all of itself, is over
                assert (ours[1, :start] == 0).all()
            assert ours[0, start:].max() > 1e-3
    assert sum(leak > 1e-3 for leak in leaks) > len(leaks) / 2


def test_nobody_takes_a_guess_for_a_choice_of_all_tokens() -> None:
    """Without auxiliary routers there is nothing causal to compute."""
    model = build(SPARSE["moma"], seed=0).eval()
    batch = batch_for(model.config, row_tokens=40)
    with pytest.raises(AssertionError, match="without auxiliary routers looks ahead"):
        model.logits(batch, causal=True)


def frozen(config: ModelConfig) -> Model:
    model = build(config, seed=0)
    parameter_groups(model, OptimConfig())
    return model


@BY_NAME
def test_all_else_is_frozen_and_costs_its_way_forward_alone(name: str) -> None:
    config = replace(AUXILIARY[name], attention=SPARSE[name].attention.__class__.mask)
    model, batch = frozen(config), batch_for(config, row_tokens=40)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if group(n) is Group.auxiliary}
    size = sum(p.numel() for n, p in model.named_parameters() if n in trained)
    assert num_parameters(config).auxiliary_router == size
    assert num_parameters(config).N == num_parameters(SPARSE[name]).N

    grouped = torch.ops.aten._grouped_mm
    cost = {grouped: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}
    counter = FlopCounterMode(display=False, custom_mapping=cost)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        output = model(batch)
        (output.loss_sum + output.auxiliary).backward()
    statistics = 2 * 2 * 40 * output.routed.numel()
    assert counter.get_total_flops() - statistics == exact_flops(
        config,
        tokens=2 * 40,
        image_tokens=len(batch.pixels) * config.image.tokens,
        labels=int((batch.labels != NO_LABEL).sum()),
        pairs=2 * 40 * 40,
    )
    asked = {"tokens": 80, "image_tokens": 0}
    assert flops(config, **asked) * 3 == flops(SPARSE[name], **asked)


def test_their_sizes_are_those_of_the_paper() -> None:
    """2 x 50.4M for the 1.4B model with 4 + 4 experts, 25.3M for the 435M."""
    for preset, expected in (("moma_4t4i_1p4b", 100.9e6), ("moma_4t4i_435m", 25.3e6)):
        described = describe([f"model={preset}", "model.moe.auxiliary_routers=true"])
        sizes = num_parameters(described.model)
        found = sizes.auxiliary_router
        assert found == pytest.approx(expected, abs=0.05e6)
        assert memory_plan(described)[1, 1][1] == 16 * found + 2 * (sizes.total - found)


def test_they_learn_who_is_chosen() -> None:
    """From a fixed model on random documents; random guesses would be right for 25 %."""
    config = replace(
        AUXILIARY["expert choice"],
        width=64,
        moe=MoEConfig(
            Routing.expert_choice, groups=ExpertGroups(text=4, image=4), auxiliary_routers=True
        ),
    )
    model = frozen(config)
    batch = pack(random_rows(8, config=config, row_tokens=200), config=config, row_tokens=200)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    keys, untrained = [], apart(model, batch)
    for _ in range(60):
        output = model(batch)
        routed = Routed.zeros(shape=output.routed.shape, device=CPU)
        routed.add(output.routed)
        keys.append(routed.keys(config.moe))
        optimizer.zero_grad()
        (output.auxiliary / (batch.document > 0).sum()).backward()
        optimizer.step()
    assert keys[-1]["moe/auxiliary/loss"] < 0.6 * keys[0]["moe/auxiliary/loss"]
    for key in ("precision", "recall"):
        assert keys[-1][f"moe/auxiliary/{key}"] > 0.75
    assert keys[-1]["moe/auxiliary/load"] == pytest.approx(1, abs=0.15)
    assert keys[-1]["moe/dropped_fraction"] == keys[0]["moe/dropped_fraction"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (group(name) is not Group.auxiliary), name
    of_tokens, of_all = apart(model, batch)
    assert of_tokens < 0.5 * untrained[0]
    assert abs(of_all) < 0.03


@torch.no_grad()
def apart(model: Model, batch: PackedBatch) -> tuple[float, float]:
    """How far losses that follow guesses are from those that look ahead: of a token, and in all."""
    model.eval()
    causal, ahead = (model(batch, causal=causal).token_losses for causal in (True, False))
    model.train()
    return float((causal - ahead).abs().mean()), float(causal.mean() - ahead.mean())


POINT, STEPS = 4, 6
GROUPS = ("model.moe.routing=expert_choice", "model.moe.groups={text:4,image:4}")
HAS_THEM = "model.moe.auxiliary_routers=true"


def overrides(directory: Path, name: str, *more: str) -> list[str]:
    return runs.overrides(
        runs.corpus(),
        directory,
        f"run.name={name}",
        "log.wandb=off",
        "data.workers=0",
        "model.norm=rms",
        "model.norm_position=swin",
        "model.moe.hidden=64",
        *GROUPS,
        f"checkpoint.keep_steps=[{POINT}]",
        "schedule.warmup_steps=0",
        "evaluation.every_steps=3",
        *(word.replace("=AT/", f"={directory}/") for word in more),
    )


CHILD = ("parent.run=AT/main", f"parent.step={POINT}", "parent.mode=auxiliary_routers", HAS_THEM)
DEPTH = ("model.mod={every:2,capacity:0.5}",)
DEEP_CHILD = ("parent.run=AT/deep", *CHILD[1:], "model.mod.auxiliary_router=true")
NEW = ("optim.learning_rate=1e-3", "data.global_rows=4", "run.seed=3", "model.z_loss=0")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with noise and its auxiliary routers, once at a stretch and once stopped between."""
    directory = tmp_path_factory.mktemp("auxiliary")
    noise = ("model.moe.gumbel_noise=true", f"schedule.total_steps={POINT}")
    total = f"schedule.total_steps={STEPS}"
    half = "schedule.total_steps=3"
    constant = "schedule.cooldown_steps=0"
    launch(
        [
            overrides(directory, "main", *noise, "model.z_loss=1e-4", constant),
            overrides(directory, "once", *CHILD, *NEW, total, constant),
            overrides(directory, "twice", *CHILD, *NEW, half, constant),
            overrides(directory, "twice", *CHILD, *NEW, total, constant),
            overrides(directory, "deep", *DEPTH, *noise, constant),
            overrides(directory, "deep child", *DEPTH, *DEEP_CHILD, *NEW, half, constant),
            overrides(directory, "deep child", *DEPTH, *DEEP_CHILD, *NEW, total, constant),
        ],
        directory=directory,
    )
    return directory


def test_a_run_trains_them_and_nothing_else(directory: Path) -> None:
    main, once, twice = (directory / name for name in ("main", "once", "twice"))
    for log in ("losses.jsonl", "evals.jsonl"):
        assert rows(once / log) == rows(twice / log)
    before = dict(Stored(main / "checkpoints" / f"step_{POINT:08d}").weights())
    found = newest(once)
    assert found is not None
    after = dict(Stored(found).weights())
    assert {n for n in after if n not in before} == {n for n in after if ".auxiliary." in n}
    assert all(torch.equal(after[name], before[name]) for name in before)
    config = read_run(once, device=CPU).config.model
    fresh = dict(build(config, seed=3).named_parameters())
    assert not any(torch.equal(after[n], fresh[n]) for n in after if n not in before)

    losses = rows(once / "losses.jsonl")
    assert [row["step"] for row in losses] == list(range(1, STEPS + 1))
    assert losses[-1]["moe/auxiliary/loss"] < losses[0]["moe/auxiliary/loss"]
    for row in losses:
        assert row["loss"] > 3
        assert all(0 < row[f"moe/auxiliary/{key}"] < 3 for key in ("precision", "recall", "load"))
        assert row["flops"] == flops(
            config, tokens=row["tokens"], image_tokens=row["tokens/modality/image"]
        )


def test_an_evaluation_has_both_losses_and_says_which_is_causal(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, once = (rows(directory / name / "evals.jsonl") for name in ("main", "once"))
    assert {row["causal"] for row in main} == {False}
    assert not any(key.startswith("ahead/") for row in main for key in row)
    losses = [key for key in main[-1] if key.startswith("loss")]
    assert len(losses) == 8
    for row in once:  # what looks ahead is frozen
        assert row["causal"]
        assert {key: row[f"ahead/{key}"] for key in losses} == {k: main[-1][k] for k in losses}
        assert all(row[key] != row[f"ahead/{key}"] for key in losses)
    trained = read_run(directory / "once", device=CPU)
    batch = next(trained.held_out_batches(trained.open_held_out(), rows_per_source=2)[0][1])
    with torch.no_grad():
        routed = Routed(trained.model(batch, causal=True).routed.double()).auxiliary_keys()
    assert once[-1].keys() >= routed.keys()
    said = (directory / "once" / "console.log").read_text()
    assert f"{once[-1]['loss']:.3f}, {once[-1]['ahead/loss']:.3f} looking ahead" in said

    monkeypatch.setattr(sys, "argv", ["evaluate", "--run", str(directory / "once")])
    evaluate.main()
    page = capsys.readouterr().out
    assert "These losses are causal" in page
    assert "Those below ahead/ are NOT" in page
    assert f"{once[-1]['loss']:.4f}" in page


def test_a_mixture_of_depths_has_both_losses_and_writes_text(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With auxiliary routers of experts and of depth together, stopped and continued."""
    main, child = (newest(directory / name) for name in ("deep", "deep child"))
    assert main is not None
    assert child is not None
    before, after = (dict(Stored(found).weights()) for found in (main, child))
    assert {n for n in after if n not in before} == {n for n in after if ".auxiliary." in n}
    assert all(torch.equal(after[name], before[name]) for name in before)
    losses, evals = (
        rows(directory / "deep child/losses.jsonl"),
        rows(directory / "deep child/evals.jsonl"),
    )
    assert [row["step"] for row in losses] == list(range(1, STEPS + 1))
    before_step = {"text": 0, "image": 0}
    for row in losses:
        assert 0.3 < row["mod/auxiliary/loss"] < 1
        until_step = {name: row[f"tokens/modality/{name}"] for name in before_step}
        seen = {name: until_step[name] - before_step[name] for name in before_step}
        kept = sum(row[f"mod/kept_fraction/modality/{name}"] * n for name, n in seen.items())
        # Half of the tokens of each of four rows, rounded down.
        assert -0.01 < sum(seen.values()) / 2 - kept < 4 / 2 + 0.01
        before_step = until_step
    (parent,) = (row for row in rows(directory / "deep/evals.jsonl") if row["step"] == POINT)
    assert (parent["causal"], evals[-1]["causal"]) == (False, True)
    assert evals[-1]["ahead/loss"] == parent["loss"] != evals[-1]["loss"]
    assert evals[-1]["mod/auxiliary/load"] >= 0

    command = ["evaluate", "--run", str(directory / "deep"), "--json", "--depth-noise"]
    noisy = []
    for more in (["0"], ["0.3"], ["0.3"], ["0.3", "--noise-seed", "1"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        evaluate.main()
        noisy.append(json.loads(capsys.readouterr().out)["loss"])
    assert noisy[0] == pytest.approx(parent["loss"], rel=1e-5)
    assert noisy[1] == noisy[2] != noisy[3]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--run", f"{directory}/once", "--depth-noise=1"])
    with pytest.raises(SystemExit, match=r"--depth-noise turns .* leave it out"):
        evaluate.main()
    written = ["--prompt", "a red", "--max-tokens", "4"]
    generate_command(["--run", str(directory / "deep child"), *written])
    assert capsys.readouterr().out.strip()
    with pytest.raises(SystemExit, match=r"model.mod.every is 2, .*train auxiliary routers for it"):
        generate_command(["--run", str(directory / "deep"), *written])


def test_it_writes_text_and_is_no_point_of_a_law(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_command(["--run", str(directory / "once"), "--prompt", "a red", "--max-tokens", "4"])
    assert capsys.readouterr().out.strip()
    assert "it trained auxiliary routers of" in str(read_for_laws(directory / "once"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("model.moe.auxiliary_routers=false",), "auxiliary_routers is false.* nothing to train"),
        (("parent.mode=upcycle",), r"learn of a trained model: .*parent.mode=auxiliary_routers"),
        (("parent.run=null", "parent.step=null"), r"parent.run is None .*give its run"),
        (("model.dropout=0.1",), r"a dropout is 0.1, which would change"),
        (("model.moe.groups.text=2",), r"model.moe.groups.text is 2 but .* made with 4"),
        (("model.moe.group_rows=2",), r"model.moe.group_rows is 2 but .* made with 1"),
        (
            ("data.masking.mean_spans=1", "data.masking.sentinels=4"),
            r"data.masking.mean_spans is 1.0 but .* made with",
        ),
        (
            ("model.moe.routing=modality_groups",),
            r"auxiliary_routers is True and .* choose expert_choice",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    directory: Path, world: World, asked: tuple[str, ...], said: str
) -> None:
    words = overrides(directory, "new", *CHILD, *NEW, "schedule.total_steps=3", *asked)
    with pytest.raises(UserError, match=said) as refusal:
        plan_and_begin(words, world=world)
    assert "\n" not in str(refusal.value)
