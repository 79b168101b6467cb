"""A budget becomes a run: every number of the plan follows from the law or a published rule."""

import json
from pathlib import Path

import numpy as np
import pytest

from nmm.config import compose, load
from nmm.errors import UserError
from nmm.flops import num_parameters, peak_flops_per_second
from nmm.scaling.__main__ import main
from nmm.scaling.allocation import optimum
from nmm.scaling.files import Written, read_fit, read_fits
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.plan import Budget, make_plan
from nmm.scaling.rules import (
    checkpoint_steps,
    choose_model,
    learning_rate,
    published_rates,
    step_rows,
)
from nmm.schedule import phases
from tests.scaling_cases import NMM, SIZES, design, planted
from tests.test_scaling_cli import rows_of, write_table


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A law of the paper's sizes, once for each of two groups, with resamples."""
    directory = tmp_path_factory.mktemp("fit")
    columns = design(N=SIZES, D=np.geomspace(2.5e9, 6e11, 6))
    points = planted(CHINCHILLA, NMM, columns=columns, noise=0.002)
    rows = [{**row, "kind": kind} for kind in ("early", "late") for row in rows_of(points)]
    for place, row in enumerate(rows):
        row["L"] = float(str(row["L"])) * (1 + 1e-9 * place)
    table = write_table(directory / "t.csv", rows)
    flags = ["--group", "kind", "--bootstrap", "100", "--out", str(directory)]
    main(["fit", *table, *flags])
    return directory


def test_the_plan_is_the_optimum_of_the_law(fitted: Path) -> None:
    found = read_fit(fitted, title="kind early, loss")
    plan = make_plan(found, Budget(1e21, gpus=64, mfu=0.4))
    size, tokens = optimum(found.record["parameters"], flops=1e21)
    assert plan.best_size == pytest.approx(float(size), rel=1e-6)
    assert plan.best_tokens == pytest.approx(float(tokens), rel=1e-6)
    low, high = plan.intervals["size"]
    assert low < float(size) < high < 2 * low
    assert 6 * plan.model.size * plan.tokens == pytest.approx(1e21, rel=1e-9)
    assert abs(np.log(plan.model.size / plan.best_size)) < 0.12
    assert plan.loss == pytest.approx(plan.best_loss, abs=1e-3)
    assert plan.loss >= plan.best_loss
    peak = peak_flops_per_second("H100")
    assert peak is not None
    assert plan.days * 86_400 * 64 * peak * 0.4 == pytest.approx(1e21)
    assert plan.phases.total_steps == -(-plan.tokens // (plan.rows * 4096))
    assert plan.beyond == pytest.approx(1e21 / (6 * 3.35e9 * 6e11))


def test_the_command_is_one_that_trains(fitted: Path) -> None:
    """Every override composes, and the config says what the plan says."""
    plan = make_plan(read_fit(fitted, title="kind late, loss"), Budget(3e19, gpus=16))
    assert plan.command.startswith("torchrun --nproc_per_node 8 --nnodes 2 ")
    assert plan.command.endswith(" ".join(plan.overrides))
    settings = load(compose(list(plan.overrides)))
    assert plan.model.size == num_parameters(settings.model).N
    assert settings.schedule.total_tokens == plan.tokens
    assert settings.data.global_rows == plan.rows
    assert plan.rows % 16 == 0
    assert settings.optim.learning_rate == pytest.approx(plan.learning_rate, rel=1e-2)
    assert settings.engine.zero_stage == plan.zero_stage


SPARSE_SIZES = (275e6, 464e6, 932e6, 1.63e9, 2.28e9, 3.35e9)


# The published rule: 2,500 steps of warmup in every sparse run under 20,000 steps.
@pytest.mark.parametrize(
    ("flops", "overrides", "warmup_steps"),
    [
        (3e19, ["model=moe_8e_275m"], 2500),
        (1.2e20, ["model=moe_8e_464m", "model.width=1280"], 2500),
        (2.5e20, ["model=moe_8e_932m"], 5000),
        (1.2e22, ["model=moe_8e_3p35b", "model.width=4512"], 5000),
    ],
)
def test_sparse_models_are_chosen_by_what_a_token_meets(
    fitted: Path,
    flops: float,
    overrides: list[str],
    warmup_steps: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The printed command composes to a model of eight experts with the longer warmup."""
    flags = ["--of", "kind early, loss", "--flops", str(flops), "--family", "moe"]
    main(["plan", "--fit", str(fitted), *flags])
    printed = capsys.readouterr().out.splitlines()[-1].partition(" train.py ")[2].split()
    settings = load(compose(printed))
    assert [one for one in printed if one.startswith("model")] == overrides
    sizes = num_parameters(settings.model)
    best = optimum(read_fit(fitted, title="kind early, loss").record["parameters"], flops=flops)[0]
    assert sizes.N_active == pytest.approx(float(best), rel=0.12)
    assert 4 * sizes.N_active < sizes.N
    assert settings.model.moe.experts == 8
    assert settings.model.depth == 24
    tokens_per_step = settings.data.global_rows * settings.data.row_tokens
    assert settings.schedule.longer_warmup
    found = phases(settings.schedule, tokens_per_step=tokens_per_step)
    assert found.warmup_steps == warmup_steps
    tokens = settings.schedule.total_tokens
    assert tokens is not None
    assert 6 * sizes.N_active * tokens == pytest.approx(flops, rel=1e-6)


def test_families_are_presets_that_differ_in_size() -> None:
    """Ablations of one size do not stand for the family, and have names of their own."""
    assert [size for size, _ in published_rates("moe")] == pytest.approx(SPARSE_SIZES, rel=0.01)
    assert published_rates("moe") == published_rates("moe_8e")
    assert choose_model(275e6, family="moe_4e").overrides == ("model=moe_4e_275m",)
    assert choose_model(275e6, family="moe_8e_top2_fine").overrides[0] == (
        "model=moe_8e_top2_fine_275m"
    )
    moma = choose_model(90e6, family="moma_8x", data="demo_codes")
    assert moma.overrides == ("model=moma_8x_90m",)
    assert moma.schedule.warmup_steps == 4000
    with pytest.raises(UserError, match=r"--family is moma, .* or several families alike"):
        choose_model(90e6, family="moma")
    with pytest.raises(UserError, match=r"model\.image\.kind is codes"):
        choose_model(90e6, family="moma_8x", data="mix_45_45_10")


# arXiv 2504.07951, table 6; its largest early size is the sister paper's.
EARLY = {275e6: 1.5e-3, 464e6: 1.5e-3, 932e6: 5e-4, 1.63e9: 4.2e-4, 2.28e9: 4e-4, 3.35e9: 3.5e-4}
EARLY |= {8.13e9: 2.4e-4, 1e8: 1.5e-3, 1.2e9: 4.6e-4, 3e10: 1.55e-4}
LATE = {289e6: 1.5e-3, 494e6: 1.5e-3, 1e9: 5e-4, 1.75e9: 4.2e-4, 2.43e9: 3.8e-4, 3.7e9: 3.3e-4}


@pytest.mark.parametrize(("family", "printed"), [("early", EARLY), ("late", LATE)])
def test_learning_rates_are_the_published_ones(family: str, printed: dict[float, float]) -> None:
    for size, rate in printed.items():
        assert learning_rate(size, family=family) == pytest.approx(rate, rel=0.03)
    assert len(published_rates(family)) == sum(size in printed for size in SIZES_OF[family])


SIZES_OF = {"early": [275e6, 464e6, 932e6, 1.63e9, 2.28e9, 3.35e9, 8.13e9], "late": list(LATE)}


@pytest.mark.parametrize("family", ["early", "late"])
def test_far_from_every_preset_the_width_is_new(family: str) -> None:
    """Any size is met within 6 %, at depth 24, by overrides that compose to that very model."""
    for size in (1.2e8, 6.6e8, 1.3e9, 5.5e9, 3e10):
        model = choose_model(size, family=family)
        assert model.size == pytest.approx(size, rel=0.12 if len(model.overrides) == 1 else 0.06)
        settings = load(compose([*model.overrides, "schedule.total_steps=1"]))
        assert num_parameters(settings.model).N_active == model.size
        assert settings.model.depth == 24
        if family == "late":
            assert settings.model.vision is not None
            assert settings.model.vision.width == pytest.approx(settings.model.width / 2, rel=0.05)
    assert choose_model(1e9, family="late").overrides == ("model=late_1b",)


def test_sizes_steps_and_checkpoints_are_round() -> None:
    assert choose_model(2.7e8, family="early").overrides == ("model=early_275m",)
    wide = choose_model(2.8e9, family="early")
    assert wide.overrides[1].startswith("model.width=")
    assert wide.size == pytest.approx(2.8e9, rel=0.02)
    with pytest.raises(UserError, match=r"--family is mine, of which .* choose of: .*early, late"):
        choose_model(1e9, family="mine")
    assert [step_rows(tokens, gpus=1) for tokens in (1e11, 2.5e9, 1e9, 1e6)] == [512, 512, 128, 1]
    assert step_rows(1e9, gpus=24) == 144
    assert [checkpoint_steps(s, days=d) for s, d in ((28_000, 2), (1000, 0.01), (5, 1))] == [
        500,
        100,
        1,
    ]


def test_what_cannot_be_planned_is_refused(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = read_fits(fitted)
    assert [fit.title for fit in fits] == ["kind early, loss", "kind late, loss"]
    for flops, gpus, mfu in (
        (-1.0, 8, 0.4),
        (1e21, 0, 0.4),
        (1e21, 8, 1.4),
        (float("nan"), 8, 0.4),
    ):
        with pytest.raises(UserError, match=r"--flops|--gpus"):
            make_plan(fits[0], Budget(flops, gpus=gpus, mfu=mfu))
    sparse = {**fits[0].record, "law": "sparse"}
    with pytest.raises(UserError, match="plans need the chinchilla law"):
        make_plan(Written("loss", sparse), Budget(1e21))
    for arguments, words in (
        (["--fit", str(fitted)], "--of is 'loss', which"),
        (["--fit", str(tmp_path)], "has no readable fit.json; write one with"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(["plan", *arguments, "--flops", "1e20"])
    main(["plan", "--fit", str(fitted), "--of", "kind late, loss", "--flops", "1e24"])
    said = capsys.readouterr().out
    assert "times the FLOPs of the largest run" in said
    assert "engine=zero3" in said
    (tmp_path / "fit.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"no readable fit\.json"):
        read_fits(tmp_path)
