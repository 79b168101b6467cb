"""Runs that begin from another run's checkpoint: trunk and branch are one run, to the bit."""

import json
import shutil
from pathlib import Path

import pytest

from nmm import begin
from nmm.checkpoint import complete
from nmm.config import compose, load
from nmm.errors import UserError
from nmm.parallel import World
from tests import runs
from tests.runs import rows
from tests.train_cases import launch

POINT = 10  # the step where the branches leave the trunk
COOLED = ("schedule.total_steps=16", "schedule.cooldown_steps=6")
SHORT = ("schedule.total_steps=6", "schedule.cooldown_steps=2")
BRANCH = ("parent.run=trunk", f"parent.step={POINT}")


def overrides(directory: Path, name: str, *more: str) -> list[str]:
    """A run with a cooldown from step 18 to 24, unless `more` says otherwise."""
    return runs.overrides(
        runs.corpus(),
        directory,
        f"run.name={name}",
        "log.wandb=off",
        "data.workers=0",
        "schedule.total_steps=24",
        "schedule.warmup_steps=4",
        "schedule.cooldown_steps=6",
        "checkpoint.every_steps=6",
        "evaluation.every_steps=5",
        *(word.replace("=trunk", f"={directory}/trunk") for word in more),
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trunk that kept the checkpoint of its step POINT, and of other runs."""
    directory = tmp_path_factory.mktemp("parent")
    keep = (f"checkpoint.keep_steps=[{POINT}]", "checkpoint.keep_every_steps=8")
    heir = ("parent.mode=weights", "data.seed=1", "optim.beta2=0.9", "engine=zero3")
    launch(
        [
            overrides(directory, "trunk", *keep, "checkpoint.keep_last=1"),
            overrides(directory, "whole", *COOLED),
            overrides(directory, "branch", *BRANCH, *COOLED),
            overrides(directory, "heir", *BRANCH, *heir, *SHORT),
        ],
        directory=directory,
    )
    return directory


def test_a_trunk_keeps_its_branch_points(directory: Path) -> None:
    found = [path.name for path in complete(directory / "trunk")]
    assert found == ["step_00000008", "step_00000010", "step_00000016", "step_00000024"]


def test_trunk_and_branch_are_one_run(directory: Path) -> None:
    trunk, branch = directory / "trunk", directory / "branch"
    for log in ("losses.jsonl", "evals.jsonl", "quarantine.jsonl"):
        before = [row for row in rows(trunk / log) if row["step"] <= POINT]
        after = [row for row in rows(branch / log) if row["step"] > POINT]
        assert before + after == rows(directory / "whole" / log), log
    assert rows(branch / "losses.jsonl")[0]["step"] == POINT + 1
    assert rows(branch / "evals.jsonl")[0] == rows(trunk / "evals.jsonl")[POINT // 5]


def test_the_manifest_tells_where_a_run_came_from(directory: Path) -> None:
    behind = rows(directory / "trunk" / "losses.jsonl")[POINT - 1]
    for name, mode in (("branch", "branch"), ("heir", "weights")):
        manifest = json.loads((directory / name / "manifest.json").read_text())
        assert manifest["parent"] == {
            "run": str(directory / "trunk"),
            "step": POINT,
            "mode": mode,
            "tokens": behind["tokens"],
            "flops": behind["flops"],
        }


def test_a_branch_goes_on_from_its_own_checkpoint_without_its_parent(directory: Path) -> None:
    branch, trunk = directory / "own", directory / "trunk"
    shutil.copytree(directory / "branch", branch)
    (branch / "checkpoints" / "step_00000016" / "COMPLETE").unlink()
    trunk.rename(directory / "away")
    try:
        launch([overrides(directory, "own", *BRANCH, *COOLED)], directory=directory)
    finally:
        (directory / "away").rename(trunk)
    assert rows(branch / "losses.jsonl") == rows(directory / "branch" / "losses.jsonl")
    manifest = json.loads((branch / "manifest.json").read_text())
    assert [start["step"] for start in manifest["starts"]] == [POINT, 12]
    assert manifest["parent"]["step"] == POINT


def test_a_run_begins_with_the_weights_of_another(directory: Path) -> None:
    """Held-out losses are the parent's to the bit; steps, counts and data begin anew."""
    heir, trunk = directory / "heir", directory / "trunk"
    parents = {row["step"]: row for row in rows(trunk / "evals.jsonl")}[POINT]
    first = rows(heir / "evals.jsonl")[0]
    losses = [key for key in first if key.startswith("loss")]
    assert [first[key] for key in losses] == [parents[key] for key in losses]
    assert (first["step"], first["tokens"]) == (0, 0)
    assert [row["step"] for row in rows(heir / "losses.jsonl")] == list(range(1, 7))
    assert "with the weights of" in (heir / "console.log").read_text()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("parent.step=null",), r"parent.run is .*trunk and parent.step is None; give both"),
        (("parent.run=null",), r"parent.run is None and parent.step is 10; give both"),
        (("parent.step=0",), r"parent.step is 0; set it above 0"),
        (("parent.mode=upside",), r"Invalid value 'upside'.*branch, weights"),
        (("parent.run=conf",), r"parent.run is conf, which is no run \(it has no manifest.json\)"),
        (
            ("parent.step=11",),
            r"parent.step is 11 but .*/trunk has complete checkpoints of the steps 8, 10, 16, 24; "
            r"give one of them, or train the parent with checkpoint.keep_steps=\[11\]",
        ),
        (("run.name='trunk'",), r"parent.run is trunk but .*step_00000024 was made with None"),
        (("model.width=64",), r"model.width is 64 but .*step_00000010 was made with 32; give the"),
        (("data.seed=1",), r"data.seed is 1 but .* was made with 0; give the value of the parent"),
        (("data.global_rows=16",), r"data.global_rows is 16 but .* was made with 8"),
        (("optim.beta2=0.9",), r"optim.beta2 is 0.9 but .* was made with 0.95"),
        (("data.sources.text.train=OTHER",), r"corpus fingerprint\) is .* but .* was made with"),
        (("schedule.total_steps=10", "schedule.cooldown_steps=0"), r"10 and parent.step is 10; a"),
        (("parent.step=24", "schedule.total_steps=30"), r"0.0015 at step 24, but .*trunk was .* 0"),
        (("schedule.cooldown_steps=8",), r"branch off where both schedules have the same rate"),
        (
            ("parent.mode=weights", "model.depth=3"),
            r"model.depth is 3 but .* was made with 2; give",
        ),
        (
            ("parent.mode=weights", "+data.units.speech=8"),
            r"data.units is \['speech=8'\] but .* was made with \[\]; give the value of the parent",
        ),
        (
            ("parent.mode=weights", "weights.decoder=x"),
            r"parent.mode is weights and weights.\* names x",
        ),
    ],
)
def test_what_does_not_fit_the_parent_is_refused(
    directory: Path, world: World, asked: tuple[str, ...], said: str
) -> None:
    other = f"{runs.corpus()}/text/train-000000.tar"
    words = overrides(directory, "new", *BRANCH, *COOLED, *asked)
    with pytest.raises(UserError, match=said) as refusal:
        plan_and_begin([word.replace("OTHER", other) for word in words], world=world)
    assert "\n" not in str(refusal.value)
    assert not (directory / "new").exists()


def test_another_parent_is_refused_once_a_run_has_a_checkpoint(
    directory: Path, world: World
) -> None:
    words = overrides(directory, "branch", *BRANCH, *COOLED, "parent.step=8")
    with pytest.raises(UserError, match=r"parent.step is 8 but .* was made with 10; restore"):
        plan_and_begin(words, world=world)


def test_a_branch_whose_first_own_checkpoint_is_gone_is_not_begun_again(
    directory: Path, world: World
) -> None:
    """Its checkpoints are due at multiples of 6, so the first one is that of step 12."""
    branch = directory / "robbed"
    shutil.copytree(directory / "branch", branch)
    shutil.rmtree(branch / "checkpoints")
    words = overrides(directory, "robbed", *BRANCH, *COOLED)
    with pytest.raises(UserError, match=r"reaches step 16 but there is no checkpoint"):
        plan_and_begin(words, world=world)
    log = branch / "losses.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    assert plan_and_begin(words, world=world).progress.step == POINT


def plan_and_begin(words: list[str], *, world: World) -> begin.Beginning:
    """What train.py does before it builds anything."""
    settings = load(compose(words))
    plan = begin.make_plan(settings, world=world)
    return begin.begin(plan, settings, world=world)
