"""Models with experts under the engine, over ZeRO stages and processes, against plain torch."""

import json
import sys

import pytest

from tests.engine_cases import OPTIM
from tests.test_engine import SAME, STAGES, SWITCHES, case, plain_torch, start, write_cases

STEPS = 4
MEMBERS = ("moe", "moma", "hard", "auxiliary", "depth")
ONE = [case(z, "sgd", model=m, steps=STEPS, micro_batch=4) for m in MEMBERS for z in (0, 3)]
ONE += [case(1, "sgd", model="moma", steps=STEPS, switches={s: True}) for s in SWITCHES]
TWO = [case(z, "sgd", model=m, steps=STEPS) for m in MEMBERS for z in STAGES]
TWO += [case(z, "adamw", model="moe", steps=STEPS) for z in (1, 3)]
TWO += [case(z, "adamw", model="moe", steps=STEPS, precision="bf16") for z in (2, 3)]
TWO += [case(3, "sgd", model="hard", steps=STEPS, blind_rank=1)]
RECOMPUTES = {"activation_checkpointing": True}
TWO += [case(3, "sgd", model="depth", steps=STEPS, switches=RECOMPUTES, resume_at=2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, dict, dict]]:
    """(processes, case, result) of every case."""
    directory = tmp_path_factory.mktemp("experts")
    asked = {1: ONE, 2: TWO}
    for processes, cases in asked.items():
        write_cases(cases, directory / f"cases{processes}.json")
    start([sys.executable, "-m", "tests.engine_cases", "--forked", str(directory)])
    found = []
    for processes, cases in asked.items():
        results = json.loads((directory / f"out{processes}.json").read_text())
        found += [(processes, *each) for each in zip(cases, results, strict=True)]
    return found


@pytest.mark.parametrize(
    ("member", "optim"), [*((member, "sgd") for member in MEMBERS), ("moe", "adamw")]
)
def test_every_split_and_stage_equals_plain_torch(
    results: list[tuple[int, dict, dict]], member: str, optim: str
) -> None:
    expected = plain_torch(optim, model_name=member, steps=STEPS)
    if member != "auxiliary":
        assert max(expected["norms"]) > OPTIM[optim].clip_norm
    chosen = {member: ["moe/balance"] for member in ("moma", "auxiliary")}
    hard = {key: ["moe/balance", "moe/entropy"] for key in ("hard", "depth")}
    missing = {"moe": [], **hard, **chosen}[member]
    compared = 0
    for processes, asked, found in results:
        which = (asked["model"], asked["optim"], asked["precision"], asked["blind_rank"])
        if which != (member, optim, "fp32", None):
            continue
        where = (processes, asked)
        assert found["losses"] == pytest.approx(expected["losses"], **SAME), where
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4), where
        for keys, plain in zip(found["routed"], expected["routed"], strict=True):
            assert [k for k, value in keys.items() if value is None] == missing
            for key in keys.keys() - missing:
                assert keys[key] == pytest.approx(plain[key], rel=1e-5, abs=1e-6), (where, key)
        for signals, plain in zip(found["signals"], expected["signals"], strict=True):
            assert signals == pytest.approx(plain, rel=1e-5), where
        if not asked["switches"]:
            assert found["weights"] == pytest.approx(expected["weights"], **SAME), where
        compared += 1
    more = {"moma": len(SWITCHES), "depth": 1}.get(member, 0)
    assert compared == (2 if optim == "adamw" else 6 + more)


def test_bf16_learns_like_fp32(results: list[tuple[int, dict, dict]]) -> None:
    expected = plain_torch("adamw", model_name="moe", steps=STEPS)
    found = [result for _, asked, result in results if asked["precision"] == "bf16"]
    assert len(found) == 2
    for result in found:
        assert result["losses"] != expected["losses"]
        assert result["losses"] == pytest.approx(expected["losses"], rel=0.02)
        assert result["norms"] == pytest.approx(expected["norms"], rel=0.1)


def test_a_process_without_images_does_not_hang_the_others(
    results: list[tuple[int, dict, dict]],
) -> None:
    (blind,) = [found for _, asked, found in results if asked["blind_rank"] is not None]
    assert len(blind["losses"]) == STEPS
    assert blind["losses"][-1] < blind["losses"][0]
