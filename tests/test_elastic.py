"""A checkpoint goes on in any shape of run: processes, ZeRO stage, micro-batch, accumulation."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nmm.pieces import WEIGHT, Stored
from tests import corpora, runs
from tests.cases import launch, result_of
from tests.runs import rows
from tests.train_cases import launch_in_turn

SAME = {"rel": 1e-5, "abs": 1e-6}
SAVED_AT, LAST = 2, 5
WORLDS, STAGES = (1, 2, 4), (0, 1, 2, 3)
# Late fusion has two learning rates and two weight decays; what is frozen is in no group. The tied
# model has dropout, which draws anew in another shape, and in bf16 sums round: only their numbers
# are compared, to the bit.
SETUPS = {
    "adamw": ("late", "adamw", "fp32"),
    "sgd": ("late", "sgd", "fp32"),
    "frozen": ("late", "frozen", "fp32"),
    "tied": ("tied", "adamw", "fp32"),
    "bf16": ("late", "frozen", "bf16"),
}
Shape = tuple[int, int]  # processes, ZeRO stage


def pairs(setup: str) -> list[tuple[Shape, Shape]]:
    """The shapes that write and read; with AdamW every pair of stages, and of worlds."""
    from_to = list(product(STAGES, STAGES))
    worlds = list(product(WORLDS, WORLDS))
    several = [
        ((worlds[n % 9][0], old), (worlds[n % 9][1], new)) for n, (old, new) in enumerate(from_to)
    ]
    match setup:
        case "adamw":
            return several
        case "sgd" | "frozen":
            return [several[n] for n in (1, 8, 11, 14)]  # 0 to 1, 2 to 0, 2 to 3, 3 to 2
        case "tied":
            return [several[n] for n in (4, 13)]  # 1 to 0, 3 to 1
        case _:
            return [several[n] for n in (6, 13)]  # 1 to 2, 3 to 1


def case(setup: str, shape: Shape, *, source: str | None = None, last: int = LAST) -> dict:
    """A case of tests/elastic_cases.py; every stage cuts up the 8 rows of a step in its own way."""
    model, optim, precision = SETUPS[setup]
    processes, stage = shape
    name = f"{setup}-{processes}x-zero{stage}"
    return {
        "name": f"{source}-to-{name}" if source else name,
        "model": model,
        "optim": optim,
        "precision": precision,
        "processes": processes,
        "zero_stage": stage,
        "micro_batch": 8 // processes // (1, 2, 1, 2)[stage],
        "source": source,
        "last": last,
        "corpus": str(corpora.corpus_directory()),
        "tokenizer": str(corpora.tokenizer_path()),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, in one launch."""
    directory = tmp_path_factory.mktemp("elastic")
    cases = {}
    for setup in SETUPS:
        undisturbed = case(setup, (1, 1 if setup == "bf16" else 0))
        cases[f"{setup}-undisturbed"] = {**undisturbed, "name": f"{setup}-undisturbed"}
        for old, new in pairs(setup):
            source = case(setup, old, last=SAVED_AT)
            goes_on = case(setup, new, source=source["name"])
            cases |= {one["name"]: one for one in (source, goes_on)}
    launch("tests.elastic_cases", list(cases.values()), directory=directory)
    return directory


@pytest.mark.parametrize("setup", ["adamw", "sgd", "frozen"])
def test_the_next_three_steps_are_those_of_an_undisturbed_run(directory: Path, setup: str) -> None:
    expected = result_of(directory, f"{setup}-undisturbed")
    names = [path.stem for path in directory.glob(f"{setup}-*-to-*.json")]
    assert len(names) == len(pairs(setup))
    for name in names:
        after = result_of(directory, name)
        assert after["stream"] == expected["stream"], name
        assert after["losses"] == pytest.approx(expected["losses"][SAVED_AT:], **SAME), name
        assert after["norms"] == pytest.approx(expected["norms"][SAVED_AT:], rel=1e-4), name


def test_the_optimizer_takes_part(directory: Path) -> None:
    """Moments and their count matter in these three steps, so that losing them would show."""
    assert Stored(directory / "adamw-1x-zero0").about.kinds == ["exp_avg", "exp_avg_sq"]
    assert Stored(directory / "adamw-1x-zero0").about.updates == SAVED_AT


def everything(checkpoint: Path) -> dict[tuple[str, str], Tensor]:
    """Every whole parameter, and all that the optimizer keeps of it."""
    stored, flat = Stored(checkpoint), {}
    freezes = "frozen" in SETUPS[checkpoint.name.partition("-")[0]]
    for name, weight in stored.weights():
        flat[name, WEIGHT] = weight.view(-1)
        is_trained = not (freezes and name.startswith("vision."))
        for kind in stored.about.kinds if is_trained else ():
            flat[name, kind] = torch.empty(weight.numel())
            stored.copy(flat[name, kind], name=name, kind=kind)
    return flat


def test_every_number_comes_through(directory: Path) -> None:
    """What a run reads and writes again is, to the bit, what another one wrote."""
    names = [path.name for path in directory.glob("*-to-*") if path.is_dir()]
    assert len(names) == sum(len(pairs(setup)) for setup in SETUPS)
    for name in names:
        old, new = everything(directory / name.partition("-to-")[0]), everything(directory / name)
        assert old.keys() == new.keys()
        for key, numbers in old.items():
            assert torch.equal(numbers, new[key]), (name, key)


def test_the_same_command_and_a_branch_go_on_in_another_shape(tmp_path: Path) -> None:
    """One process with ZeRO 1 and four micro-batches; then two with ZeRO 3 or 2, and one each."""

    def words(name: str, steps: int, *more: str) -> list[str]:
        fixed = ("log.wandb=off", "data.workers=0", "schedule.warmup_steps=2", "engine=zero1")
        length = (f"schedule.total_steps={steps}", "checkpoint.every_steps=3")
        often = ("evaluation.every_steps=3", "log.signals_every_steps=1", "engine.micro_batch=2")
        options = (f"run.name={name}", *fixed, *length, *often, *more)
        return runs.overrides(runs.corpus(), tmp_path, *options)

    branch = (f"parent.run={tmp_path}/whole", "parent.step=3", "checkpoint.keep_last=9")
    said = launch_in_turn(
        [
            (1, [words("whole", 6, "checkpoint.keep_last=9"), words("moved", 3)]),
            (
                2,
                [
                    words("moved", 6, "engine=zero3", "engine.micro_batch=4"),
                    words("branch", 6, "engine=zero2", "engine.micro_batch=4", *branch),
                ],
            ),
        ],
        directory=tmp_path,
    )
    assert said.count("after step 3 of 6, written by 1 process with ZeRO 1") == 1
    assert said.count("tokens), written by 1 process with ZeRO 1") == 1
    for log in ("losses", "evals"):
        whole, moved, branched = (
            rows(tmp_path / name / f"{log}.jsonl") for name in ("whole", "moved", "branch")
        )
        assert [row["step"] for row in moved] == [row["step"] for row in whole]
        assert branched[-1]["step"] == 6
        for row, expected in zip(moved + branched, whole + whole[-len(branched) :], strict=True):
            check_alike(row, expected)


def check_alike(row: dict, expected: dict) -> None:
    """Two rows of a log whose floats may differ in the last digits."""
    floats = {key: value for key, value in expected.items() if isinstance(value, float)}
    assert {key: row[key] for key in floats} == pytest.approx(floats, **SAME), row["step"]
    others = expected.keys() - floats.keys()
    assert row.keys() == expected.keys()
    assert {key: row[key] for key in others} == {key: expected[key] for key in others}
