"""What a study plans: which runs, how long, at what cost; what it hands to Slurm."""

import csv
import json
import re
import subprocess
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from launch.study.__main__ import main, names
from launch.study.answers import Found, answer
from launch.study.costs import Rates, disk_bytes
from launch.study.measured import fits_of, pair_of
from launch.study.plan import plan_runs, short
from launch.study.results import write_results
from launch.study.run import Role, StudyRun
from launch.study.state import Folder, Standing, State
from launch.study.table import plan_text
from launch.study.words import WORDS, measured
from nmm import rundir
from nmm.config import Design, Measure, ParentMode, StudyConfig, compose, compose_study, load
from nmm.config.study import UpcycleConfig
from nmm.errors import UserError
from nmm.scaling.answers import CANNOT_TELL, REPRODUCES, read_answers
from nmm.scaling.estimates import FEWEST_SIZES
from nmm.schedule import learning_rate
from tests.test_scaling_runs import write_run

MOMA = ("dense", "moe_1t1i", "moe_8x", "moe_4t4i", "mod_4t4i", "upcycled")
PAPER = ("nmm_early", "nmm_late", "nmm_moe")
STEP_TOKENS = 512 * 4096
STUDIES = Path(__file__).parent.parent / "docs" / "studies"


@cache
def planned(*words: str) -> tuple[StudyConfig, list[StudyRun]]:
    study = compose_study(list(words)).study
    return study, plan_runs(study)


def study_file(folder: Path, **values: object) -> list[str]:
    """The words that choose a study that is in no conf/."""
    path = folder / "study" / "ours.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"name": "ours", **values}))
    return [f"hydra.searchpath=[{folder}]", "study=ours", f"study.dir={folder}/runs"]


@pytest.mark.parametrize("name", PAPER)
def test_a_study_of_the_paper_has_76_models_of_six_sizes(name: str) -> None:
    """Warmups of appendix A, and the rates and sizes of table 6, which the presets hold."""
    study, runs = planned(f"study={name}")
    points = [run for run in runs if run.is_point]
    assert len(points) == len({run.name for run in points}) == 76
    assert len({run.cell.size for run in points}) == 6
    assert min(run.tokens for run in points) == pytest.approx(2.5e9, rel=1e-3)
    assert "ours: which numbers of tokens" in " ".join(study.about)
    longer = name == "nmm_moe"
    for run in points:
        steps = run.phases.total_steps
        published = (1000, 2500, 5000)[(steps > 4999) + (steps > 15_000)]
        if longer:
            published = 2500 if steps < 20_000 else 5000
        assert run.phases.warmup_steps == min(published, steps // 2), run.name
        assert run.cell.step_tokens == STEP_TOKENS
        assert run.flops == run.cell.flops(steps)


def test_late_fusion_is_counted_with_its_encoder_on_image_tokens() -> None:
    _, runs = planned("study=nmm_late")
    run = runs[-1]
    parameters, tokens = run.cell.parameters, run.tokens
    images = round(0.543 * tokens)
    assert run.flops == 6 * (parameters.N_vision * images + parameters.N_text * tokens)


def test_sparse_models_are_counted_by_what_a_token_meets() -> None:
    _, runs = planned("study=nmm_moe")
    largest = runs[-1]
    assert largest.flops == 6 * 3354247168 * largest.tokens
    assert round(largest.cell.parameters.N / 1e6, 1) == 17532.4
    assert max(run.tokens for run in runs) == pytest.approx(600e9, rel=1e-3)


def test_resolutions_change_the_tokens_of_images_and_nothing_else() -> None:
    """The shares are those of 45-45-10, with as much text beside an image as at 224 pixels."""
    _, runs = planned("study=nmm_resolution")
    assert len(runs) == 2 * 2 * 5
    assert {run.phases.total_steps for run in runs} == {95_368}
    for run in runs:
        image = run.cell.config.model.image
        assert run.cell.mixture == f"px{image.side_pixels}"
        assert image.tokens == (image.side_pixels // 14) ** 2
        share = 0.45 * (image.tokens / (image.tokens + 77) + image.tokens / (image.tokens + 322))
        assert run.cell.image_fraction == pytest.approx(share, abs=1e-3)
    for name in ("early-1b", "early-1p7b", "late-1b", "late-1p7b"):
        flops = {run.flops for run in runs if run.cell.name.startswith(f"{name}-")}
        assert (len(flops) == 1) == name.startswith("early")


def test_models_that_begin_as_models_of_text_have_the_shape_of_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NMM_WEIGHTS", "/lake")
    runs = plan_runs(compose_study(["study=nmm_text_init"]).study)
    given = {run.cell.family: run.cell.config.weights for run in runs}
    assert {name: (one.decoder, one.vision) for name, one in given.items()} == {
        "early": (None, None),
        "early_given": ("/lake/text_1p4b", None),
        "late": (None, None),
        "late_given": ("/lake/text_1p4b", "/lake/vision_300m"),
    }
    assert {run.cell.parameters.N_text for run in runs} == {1_439_694_848}
    for one in ("early", "late"):
        plain, begun = (
            [run.flops for run in runs if run.cell.family == name] for name in (one, f"{one}_given")
        )
        assert plain == begun


def test_models_of_moma_s_table_cost_as_much_as_their_dense_one() -> None:
    """1.0066T tokens each; sizes as printed, but for the rounding of 90M, 1.9B, 7.1B."""
    _, runs = planned("study=moma_table1")
    assert {run.tokens for run in runs} == {1_006_632_960_000}
    steps = {run.cell.size: run.phases.total_steps for run in runs}
    assert steps == {"90m": 160_000, "435m": 160_000, "1p4b": 120_000}
    totals: dict[str, dict[str, int]] = {}
    for run in runs:
        parameters = run.cell.parameters
        totals.setdefault(run.cell.family, {})[run.cell.size] = round(parameters.N / 1e6)
        assert run.flops == 6 * parameters.N_active * run.tokens
    assert totals == {
        "dense": {"90m": 92, "435m": 436, "1p4b": 1476},
        "moe_8x": {"90m": 210, "435m": 1845, "1p4b": 7113},
        "moe_1t1i": {"90m": 109, "435m": 637, "1p4b": 2282},
        "moe_4t4i": {"90m": 210, "435m": 1845, "1p4b": 7113},
    }
    assert len({run.flops for run in runs}) == 3


def test_every_pair_of_modalities_is_trained_and_each_alone() -> None:
    _, runs = planned("study=mixed_modal_pairs")
    assert len(runs) == 300
    modalities = ("text", "image", "speech", "code", "molecule")
    shares = {
        run.cell.mixture: {name: s.weight for name, s in run.cell.config.data.sources.items()}
        for run in runs
    }
    alone = {name: {name: 1.0} for name in modalities}
    pairs = {f"{a}_{b}": {a: 0.5, b: 0.5} for a, b in combinations(modalities, 2)}
    assert shares == alone | pairs
    assert {run.cell.step_tokens for run in runs} == {2**20}
    assert {run.phases.warmup_steps for run in runs} == {500}
    assert [round(run.tokens / 1e9) for run in runs[:4]] == [5, 10, 25, 100]


@pytest.mark.parametrize(
    ("name", "minutes", "points"),
    [("mini", 10, dict.fromkeys(("early", "late", "sparse"), 9)),
     ("mini_nmm", 60, {**dict.fromkeys(("early", "late", "sparse"), 16), "hard": 8}),
     ("h200_nmm", 25, {**dict.fromkeys(("early", "late", "sparse"), 16), "hard": 8}),
     ("mini_mixed", 40, {"dense": 72, "batch": 9}),
     ("mini_moma", 40, dict.fromkeys(MOMA, 6))],
)  # fmt: skip
def test_small_studies_fit_onto_their_machine_and_have_points_for_their_laws(
    name: str, minutes: int, points: dict[str, int]
) -> None:
    """At the speed that their files say; a size has one trunk, if it has any."""
    study, runs = planned(f"study={name}")
    found = Counter(run.cell.family for run in runs if run.is_point)
    assert found == points
    cells = {run.cell.name for run in runs}
    trunks = 0 if study.design is Design.whole else len(cells)
    assert sum(run.role is Role.trunk for run in runs) == trunks
    assert study.device.flops_per_second is not None
    seconds = sum(run.own_flops for run in runs) / study.device.flops_per_second / study.parallel
    assert seconds < 0.9 * 60 * minutes


@pytest.mark.parametrize(("name", "families", "within"), [
    ("mini_nmm", ("early", "sparse"), 0), ("mini_moma", MOMA, 0.05)])  # fmt: skip
def test_sparse_models_of_small_studies_cost_as_much_as_dense_ones(
    name: str, families: tuple[str, ...], within: float
) -> None:
    """A mixture of depths in whole layers comes within 5 %."""
    _, runs = planned(f"study={name}")
    first, *others = (
        sorted(run.flops for run in runs if run.is_point and run.cell.family == family)
        for family in families
    )
    for flops in others:
        assert flops == pytest.approx(first, rel=within, abs=0)


def test_the_study_of_one_gpu_spans_two_decades_and_fills_it() -> None:
    """Of every family; it stops after 25 minutes, and its checkpoints fit onto its disk."""
    study, runs = planned("study=h200_nmm")
    for family in ("early", "late", "sparse"):
        flops = [run.flops for run in runs if run.is_point and run.cell.family == family]
        assert max(flops) > 100 * min(flops)
    assert study.max_minutes == 25
    assert {run.cell.slots for run in runs} == {1, 2, 4}
    assert max(run.cell.slots for run in runs) < study.parallel
    assert sum(map(disk_bytes, runs)) < 30e9


def test_an_upcycled_run_has_its_seed_behind_it() -> None:
    """As many tokens as one from nothing; its seed keeps the checkpoint that it begins from."""
    study, runs = planned("study=mini_moma")
    by_name = {run.name: run for run in runs}
    upcycled = [run for run in runs if run.role is Role.upcycled]
    assert {run.cell.family for run in upcycled} == {"upcycled"}
    for run in upcycled:
        assert run.trunk is not None
        seed = by_name[run.trunk]
        assert seed.cell.name == run.cell.name.replace("upcycled", "moe_1t1i")
        assert (seed.role, seed.keep_steps) == (Role.whole, (run.first_step,))
        assert run.first_step == round(60_000 / run.cell.step_tokens)
        assert (run.tokens, run.flops) == (seed.tokens, run.cell.flops(seed.phases.total_steps))
        assert run.own_steps == seed.phases.total_steps - run.first_step == run.phases.total_steps
        config = load(compose(run.words(runs=Path("runs"), group=study.name)))
        parent = config.parent
        assert (parent.run, parent.step) == (f"runs/{seed.name}", run.first_step)
        assert parent.mode is ParentMode.upcycle
        kept = load(compose(seed.words(runs=Path("runs"), group=study.name))).checkpoint.keep_steps
        assert kept == [run.first_step]


def test_a_seed_keeps_the_checkpoints_of_all_that_begin_from_it() -> None:
    study, _ = planned("study=mini_moma")
    upcycled = study.families["upcycled"]
    small = {"w48": upcycled.sizes["w48"]}
    later = replace(upcycled, sizes=small, upcycle=UpcycleConfig("moe_1t1i", 120_000))
    runs = plan_runs(replace(study, families={**study.families, "later": later}))
    begun: dict[str, set[int]] = {}
    for run in runs:
        if run.role is Role.upcycled:
            begun.setdefault(str(run.trunk), set()).add(run.first_step)
    seeds = {run.name: run for run in runs if run.name in begun}
    assert len(seeds) == 6
    for name, run in seeds.items():
        assert run.keep_steps == tuple(sorted(begun[name]))
        assert len(run.keep_steps) == 1 + (run.cell.size == "w48")


def test_a_seed_is_trained_on_what_is_made_of_it() -> None:
    study, _ = planned("study=mini_moma")
    seed = replace(study.families["moe_1t1i"], mixtures=["codes"])
    mixtures = {**study.mixtures, "other": study.mixtures["codes"]}
    fewer = replace(study, families={**study.families, "moe_1t1i": seed}, mixtures=mixtures)
    with pytest.raises(UserError, match="upcycled is trained on other, and the family moe_1t1i"):
        fewer.check()


def test_a_family_may_be_trained_on_some_of_the_mixtures() -> None:
    """The scan of batches: pairs alone, at the tokens of runs that are points of their laws."""
    study, runs = planned("study=mini_mixed")
    scan = [run for run in runs if run.is_point and run.cell.family == "batch"]
    assert {run.cell.mixture for run in scan} == set(study.pairs)
    assert {run.cell.config.data.global_rows for run in scan} == {1, 4, 8}
    usual = [run for run in runs if run.is_point and run.cell.name == "dense-w64-text_code"]
    assert usual[0].cell.config.data.global_rows == 2
    assert {run.cell.parameters.N for run in scan} == {usual[0].cell.parameters.N}
    for run in scan:
        assert min(abs(run.tokens / other.tokens - 1) for other in usual) < 0.02


def test_branches_leave_their_trunk_where_both_have_the_peak_rate() -> None:
    """And a trunk serves every branch with its warmup, to the last step that one needs."""
    _, runs = planned("study=nmm_early")
    trunks = {run.name: run for run in runs if run.role is Role.trunk}
    assert len(trunks) == 4 * 4 + 2 * 3  # the two largest have no run of 2.5B tokens
    for run in runs:
        if run.trunk is None:
            continue
        trunk, point = trunks[run.trunk], run.first_step
        assert point in trunk.keep_steps
        assert trunk.phases.total_steps == max(trunk.keep_steps)
        rates = {
            learning_rate(run.cell.config.schedule, phases=one.phases, peak=1.0, step=point)
            for one in (trunk, run)
        }
        assert rates == {1.0}
        assert run.own_steps == run.phases.cooldown_steps
    spent = sum(run.own_flops for run in runs)
    assert spent < 0.5 * sum(run.flops for run in runs if run.is_point)


def test_every_seed_has_a_trunk_of_its_own() -> None:
    """Seeds differ in nothing else, and are points of one law."""
    _, once = planned("study=mini")
    _, runs = planned("study=mini", "study.seeds=[0,3]")
    assert len(runs) == 2 * len(once)
    by_name = {run.name: run for run in runs}
    assert len(by_name) == len(runs)
    for run in once:
        assert by_name[run.name] == run
        cell = replace(run.cell, seed=3, words=(*run.cell.words, "run.seed=3"))
        names = [name and name.replace("-demo", "-demo-s3") for name in (run.name, run.trunk)]
        assert by_name[str(names[0])] == replace(run, cell=cell, name=names[0], trunk=names[1])
        assert cell.group == run.cell.group


def test_the_words_of_a_run_make_the_config_that_was_planned(tmp_path: Path) -> None:
    values = {
        "token_budgets": [40_960, 81_920],
        "seeds": [3],
        "overrides": ["data=demo", "schedule.warmup_tokens=8192", "schedule.cooldown_fraction=1"],
        "families": {
            "early": {"sizes": {"w64": {"overrides": ["model.width=64"]}}},
            "late": {"sizes": {"w64": {"overrides": ["model=tiny_late"]}}},
        },
        "mixtures": {
            "words": {"weights": {"text": 1.0, "caption": 0.5}, "image_fraction": 0.2},
            "all": {},
        },
    }
    _, runs = planned(*study_file(tmp_path, **values))
    assert len(runs) == 2 * 2 * (1 + 2)
    for run in runs[:8]:
        config = load(compose(run.words(runs=Path("runs"), group="ours")))
        assert (config.run.name, config.log.wandb_group) == (run.name, "ours")
        assert config.run.seed == run.cell.seed == 3
        schedule = config.schedule
        lengths = (schedule.total_steps, schedule.warmup_steps, schedule.cooldown_steps)
        phases = run.phases
        assert lengths == (phases.total_steps, phases.warmup_steps, phases.cooldown_steps)
        if run.role is Role.trunk:
            assert tuple(config.checkpoint.keep_steps) == run.keep_steps == (6, 11)
        else:
            assert config.parent.run == f"runs/{run.trunk}"
            assert config.parent.step == run.first_step
        weights = {name: source.weight for name, source in config.data.sources.items()}
        assert (weights == {"caption": 0.5, "text": 1.0}) == (run.cell.mixture == "words")
    cell = next(run.cell for run in runs if run.cell.group == "late-words")
    vision, text = cell.parameters.N_vision, cell.parameters.N_text
    assert cell.flops(5) == 6 * (vision * round(0.2 * 5 * 4096) + text * 5 * 4096)
    whole = plan_runs(compose_study([*study_file(tmp_path, **values), "study.design=whole"]).study)
    assert {run.role for run in whole} == {Role.whole}
    assert [run.flops for run in whole] == [run.flops for run in runs if run.is_point]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study=nothing"], r"Could not find 'study/nothing' Available options"),
        (["dry_run=true"], r"You must specify 'study'"),
        (["study=nmm_early", "study.retrys=2"], r"Key 'retrys' not in 'StudyConfig'"),
        (["study=nmm_early", "study.token_budgets=[]"], r"study.token_budgets is \[\] for family"),
        (["study=nmm_early", "study.parallel=0"], r"study.parallel is 0; set it above 0"),
        (["study=nmm_early", "study.name=a/b"], r"the name 'a/b', which is to be part of a folder"),
        (["study=nmm_early", 'study.families.early.overrides=["model.widht=3"]'], r"Key 'widht'"),
        (
            ["study=nmm_early", "+study.mixtures.mix_45_45_10.weights={sounds:1.0}"],
            r"study.mixtures gives sounds a weight, but the sources are dfn, coyo",
        ),
        (
            [
                "study=nmm_early",
                'study.families.early.overrides=["schedule.cooldown_fraction=null"]',
            ],
            r"has no constant phase to branch off from; set study.design=whole",
        ),
        (
            ["study=mini", "study.questions.sparse_against_dense.against=thin"],
            r"study.questions.sparse_against_dense.against is thin and \S+ is loss_gap; choose of: "
            r"early, late, sparse",
        ),
        (
            ["study=mini_nmm", "study.questions.early_prediction.claim=[1, 0]"],
            r"study.questions.early_prediction.claim is \[1.0, 0.0\]; give \[low, high\]",
        ),
        (["study=mini", "+study.pairs.a=[demo]"], r"study.pairs.a is \['demo'\] and"),
        (
            ["study=mini_mixed", "study.families.batch.mixtures=[sound]"],
            r"study.families.batch.mixtures has sound, and study.mixtures are text, image",
        ),
        (
            ["study=mini_moma", "study.questions.depth.loss=loss/kind/text"],
            r"study.questions.depth.loss is loss/kind/text, and eta knows losses of all tokens",
        ),
        (["study=mini_moma", "study.design=trunk"], r"upcycle.family is moe_1t1i and study.design"),
        (
            ["study=mini_moma", "study.families.upcycled.upcycle.tokens=600_000"],
            r"upcycle.tokens is 600,000, which is step 293 of \S+ and of \S+; give fewer tokens",
        ),
        (
            [
                "study=mini_moma",
                "study.families.upcycled.sizes.w48.overrides="
                '["data.global_rows=1","data.row_tokens=2048"]',
            ],
            r"upcycled-w48-codes-600k and \S+, which .*, have other data.row_tokens: 2048 and 1024",
        ),
        (
            ["study=nmm_early", 'study.families.early.overrides=["schedule.cooldown_steps=0"]'],
            r"a run of 2,500,000,000 tokens of \S+ has no step of cooldown for its branch to take",
        ),
    ],
)
def test_what_cannot_be_a_study_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        plan_runs(compose_study(words).study)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (2_500_000_000, "2p5b"),
        (7, "7"),
        (400_000, "400k"),
        (12_288, "12p288k"),
        (1_234_567, "1234p567k"),
    ],
)
def test_numbers_of_tokens_become_names_that_differ(tokens: int, expected: str) -> None:
    assert short(tokens) == expected


def test_a_plan_adds_up_and_names_what_is_ours() -> None:
    study, runs = planned("study=nmm_early")
    lines = plan_text(study, runs, rates=Rates({}, flops_per_second=1e15)).splitlines()
    assert any("ours: which numbers of tokens" in line for line in lines)
    table = [line.split() for line in lines if line.startswith("nmm_early-")]
    assert [row[0] for row in table] == [run.name for run in runs]
    assert f"{sum(run.own_flops for run in runs):.4g} FLOPs to train" in lines[-2]
    hours = sum(run.own_flops for run in runs) / 1e15 / 3600
    assert lines[-1].startswith(f"{hours:,.4g} hours of runs at 1e+15 FLOPs/s")
    largest = next(row for row in table if row[0].endswith("3p35b-mix_45_45_10-400b"))
    assert largest[1:5] == ["3.354B", "3.354B", "400B", f"{6 * 3354247168 * 190735 * 2**21:.3g}"]
    assert largest[-1] == f"{12 * 3.354247168:.3g}"  # weights and two moments, in float32


def test_a_study_that_has_not_begun_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study=mini", f"study.dir={tmp_path / 'of mine'}"]
    for named, code, said in (
        ("status", 0, r"no run has begun\n0 of 27 models and 0 of 9 trunks finished"),
        ("report", 1, r"36 runs are not done; `python -m launch.study status study=mini '.*'` say"),
    ):
        with pytest.raises(SystemExit, match=f"^{code}$"):
            main([named, *words])
        assert re.search(said, capsys.readouterr().out)


def test_branches_are_arrays_that_wait_for_their_trunk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every script is bash that gives each task the words of its run."""
    where = [f"study.dir={tmp_path}", "study.slurm.time=2:00:00", "study.slurm.nodes=2"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["study=nmm_early", "submit=slurm", "dry_run=true", *where])
    _, *scripts = capsys.readouterr().out.split("#!/bin/bash\n")
    _, runs = planned("study=nmm_early")
    assert len(scripts) == 1 + 22 + 1  # the trunks, the branches of each, the report
    given = []
    for script in scripts[:-1]:
        tasks = int(re.findall(r"#SBATCH --array=0-(\d+)", script)[0]) + 1
        choice = script[script.index("case ") : script.index("esac") + 4]
        ask = "\n".join(
            f'SLURM_ARRAY_TASK_ID={task}; {choice}; printf \'%s\\n\' "$run" "${{overrides[@]}}" END'
            for task in range(tasks)
        )
        shown = subprocess.run(
            ["bash", "-u"], input=ask, capture_output=True, text=True, check=True
        )
        given += [words.split("\n") for words in shown.stdout.split("\nEND\n")[:-1]]
        assert "#SBATCH --nodes=2\n" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    by_name = {run.name: run for run in runs}
    assert {Path(words[0]).name for words in given} == by_name.keys()
    for directory, *words in given:
        run = by_name[Path(directory).name]
        assert words == run.words(runs=tmp_path, group="nmm_early")
    waits = re.findall(r"--dependency=afterok:JOB\[(\S+)\]_(\d+)\n", "".join(scripts))
    assert len(waits) == 22
    assert sorted(int(task) for _, task in waits) == list(range(22))
    assert "launch.study report study=nmm_early" in scripts[-1]
    assert scripts[-1].count("JOB[") == 98  # of every run
    assert not list(tmp_path.iterdir())


def plant(run: StudyRun, *, runs: Path, loss: float, diverges: bool = False) -> None:
    """What a run of the study `ours` leaves that ended with this loss, or half way to it."""
    steps, there = run.phases.total_steps, runs / run.name
    at = {"size": run.cell.parameters.N, "tokens": run.tokens, "losses": {"loss": loss}}
    write_run(there, last_step=steps // 2 if diverges else steps, **at)
    (there / "overrides.txt").write_text("\n".join(run.words(runs=runs, group="ours")))
    rundir.end(there, how="diverged" if diverges else "finished", step=9, is_main=True)


def test_a_report_fits_every_family_and_leaves_out_what_is_no_point(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of runs with planted losses; the trunks were deleted since, and one run diverged.

    The late ones are 0.05 nats worse, in every run alike.
    """
    widths = {f"w{width}": {"overrides": [f"model.width={width}"]} for width in (32, 64, 128)}
    words = study_file(
        tmp_path,
        overrides=["data=demo"],
        token_budgets=[tokens * 4096 for tokens in (50, 100, 200, 400)],
        families={"early": {"sizes": widths}, "late": {"sizes": widths}},
        bootstrap=0,
        questions={
            "gap": {"measure": "loss_gap", "of": "early", "against": "late", "claim": [0, None]},
            "size": {"measure": "size_exponent", "of": "early", "claim": [0.4, 0.5]},
            "missed": {"measure": "prediction_error", "of": "early", "claim": [0, 1]},
            "kinds": {"measure": "loss_gap", "of": "early", "against": "late", "loss": "loss/x"},
        },
    )
    runs = plan_runs(compose_study(words).study)
    for run in runs:
        if run.is_point:
            loss = 2 + 30 / run.cell.parameters.N**0.3 + 40 / run.tokens**0.25
            loss += 0.05 * (run.cell.family == "late")
            plant(run, runs=tmp_path / "runs", loss=loss, diverges=run is runs[-1])
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["report", *words])
    said = capfd.readouterr().out
    notes = tmp_path / "runs" / "ours"
    fitted = json.loads((notes / "fits" / "early" / "fit.json").read_text())
    assert fitted["points"] == 12
    assert fitted["parameters"]["alpha"] == pytest.approx(0.3, abs=1e-4)
    assert (notes / "report" / "report.html").stat().st_size > 0
    assert f"left out: {runs[-1].name}: diverged" in said
    rows = list(csv.DictReader((notes / "runs.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == [run.name for run in runs]
    points = [path.resolve().name for path in (notes / "points" / "late").iterdir()]
    late = [run.name for run in runs[:-1] if run.is_point and run.cell.family == "late"]
    assert sorted(points) == sorted(late)
    gap, kinds, missed, size = read_answers(notes / "answers")
    assert gap.measured == "loss of late less that of early"
    assert [one.verdict for one in (gap, size, missed)] == [REPRODUCES, CANNOT_TELL, CANNOT_TELL]
    assert (gap.estimate and gap.estimate.value) == pytest.approx(0.05)
    assert (size.estimate and size.estimate.value) == pytest.approx(0.25 / 0.55, abs=1e-3)
    assert "fewer than three sizes are left" in missed.why_not
    assert "has no loss/x" in kinds.why_not
    assert "ours: the paper" in (notes / "report" / "report.html").read_text()


@pytest.mark.parametrize("name", names())
def test_questions_of_a_study_have_words_and_can_be_answered(name: str) -> None:
    """An error of prediction is of a law that has three sizes besides the largest."""
    study, _ = planned(f"study={name}")
    assert WORDS.keys() == set(Measure)
    for question in study.questions.values():
        assert question.of in measured(question) or question.measure is Measure.best_batch
        assert "None" not in measured(question)
        if question.measure is Measure.prediction_error:
            assert len(study.families[question.of].sizes) > FEWEST_SIZES


def test_studies_may_share_a_folder() -> None:
    """No two of ours have a run or a folder of notes of the same name."""
    made = [run.name for name in names() for run in planned(f"study={name}")[1]]
    assert len({*made, *names()}) == len(made) + len(names())


def test_no_earlier_law_answers_where_there_is_none_now(tmp_path: Path) -> None:
    """Of a family, and of a pair, whose runs are no points any more."""
    study, runs = planned("study=mini_mixed")
    folder = Folder(tmp_path, study.name)
    laws = [fits_of(folder) / "dense-text", pair_of(folder, family="dense", pair="text_image")]
    for law in laws:
        law.mkdir(parents=True)
        (law / "fit_mixed.json").write_text('{"parameters": {"C": 1}}')
    found = Found(study, runs, folder)
    question = study.questions["synergy_of_text_and_image"]
    assert found.pair(question) == laws[1]
    standings = {run.name: Standing(State.waiting) for run in runs}
    write_results(study, runs, standings, folder=folder)
    assert not any(law.exists() for law in laws)
    assert answer("synergy", question, found=found).why_not.startswith(
        "there is no law of the pair"
    )


@pytest.mark.parametrize(
    ("name", "points"), [("mini_nmm", 56), ("mini_moma", 36), ("mini_mixed", 81)]
)
def test_the_page_of_studies_prints_the_numbers_of_their_answers(name: str, points: int) -> None:
    """And every run of the tables is finished, and says which commit made it."""
    with (STUDIES / name / "runs.csv").open(newline="") as lines:
        runs = [row for row in csv.DictReader(lines) if row["role"] != "trunk"]
    assert len(runs) == points
    assert all(row["state"] == "finished" and len(row["commit"]) == 40 for row in runs)
    with (STUDIES / name / "answers.csv").open(newline="") as lines:
        known = [[row[key] for key in ("value", "low", "high")] for row in csv.DictReader(lines)]
    page = (STUDIES / "README.md").read_text()
    section = page[page.index(f"## Results of `{name}`") :].split("\n## ")[0]
    number = r"(-?\d[\d.]*(?:e\d+)?)"
    printed = re.findall(rf"{number} (?:\| |\(){number} to {number}[ )]", section)
    assert len(printed) >= 9
    for numbers in printed:
        rounded = [
            [in_print(one, like=other) for one, other in zip(row, numbers, strict=True)]
            for row in known
            if all(row)
        ]
        assert list(numbers) in rounded, numbers


def in_print(number: str, *, like: str) -> str:
    """ "0.0175", like "0.018" -> "0.018"; "152000", like "2e5" -> "2e5"."""
    if "e" in like:
        return f"{float(number):.0e}".replace("e+0", "e")
    return f"{float(number):.{len(like.partition('.')[2])}f}"
