"""A trace of some steps: it opens, names the phases, and changes nothing of the run."""

import json
from pathlib import Path

import pytest

from nmm import begin
from nmm.config import compose, load
from nmm.errors import UserError
from nmm.heartbeat import Phase
from nmm.parallel import World
from nmm.trace import refuse_outside
from tests import runs, train_cases

MICRO_BATCHES = 2
TRACED = range(2, 4)


def words(directory: Path, name: str, *more: str) -> list[str]:
    """Overrides of four steps on two processes, with a checkpoint after the third."""
    short = ("schedule.total_steps=4", "schedule.warmup_steps=0", "checkpoint.every_steps=3")
    quiet = ("evaluation.at_start=false", "evaluation.every_steps=0", "log.wandb=off")
    own = (f"run.name={name}", "data.workers=0", "engine.micro_batch=2", *short, *quiet)
    return runs.overrides(runs.corpus(), directory, *own, *more)


def test_a_trace_opens_with_the_phases_by_name_and_changes_no_bit(tmp_path: Path) -> None:
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    asked = [words(tmp_path, "plain"), words(tmp_path, "traced", "log.profile_steps=[2,3]")]
    train_cases.launch(asked, directory=tmp_path, processes=2)
    assert runs.rows(plain / "losses.jsonl") == runs.rows(traced / "losses.jsonl")
    assert not (plain / "traces").exists()
    files = sorted((traced / "traces").iterdir())
    assert [path.name for path in files] == [f"steps_2_to_3_rank_0000{r}.json" for r in (0, 1)]
    for path in files:
        events = [one for one in json.loads(path.read_text())["traceEvents"] if "dur" in one]
        spans = {
            name: sorted(
                (one["ts"], one["ts"] + one["dur"]) for one in events if name == one["name"]
            )
            for name in [*(phase.value for phase in Phase), *(f"step {n}" for n in range(1, 5))]
        }
        counts = {phase: len(spans[phase.value]) for phase in Phase}
        assert counts[Phase.data] == len(TRACED)
        for phase in (Phase.forward, Phase.backward, Phase.optimizer):
            assert counts[phase] == len(TRACED) * MICRO_BATCHES
        assert counts[Phase.checkpoint] == 1
        assert counts[Phase.start] == counts[Phase.evaluation] == counts[Phase.end] == 0
        assert [len(spans[f"step {n}"]) for n in range(1, 5)] == [0, 1, 1, 0]
        (_, second), (third, _) = spans["step 2"][0], spans["step 3"][0]
        assert all(end <= second or begin >= third for begin, end in spans[Phase.forward.value])
        products = [one for one in events if one["name"] == "aten::mm"]
        inside = [
            one
            for one in products
            if any(begin <= one["ts"] < end for begin, end in spans[Phase.forward.value])
        ]
        assert len(inside) > 10


@pytest.mark.parametrize("steps", ["[3,5]", "[7,9]"])
def test_steps_that_the_run_does_not_have_are_refused_before_it_begins(
    world: World, tmp_path: Path, steps: str
) -> None:
    asked = load(compose(words(tmp_path, "no", f"log.profile_steps={steps}")))
    plan = begin.make_plan(asked, world=world)
    with pytest.raises(UserError, match=r"log.profile_steps is .* steps of the run are 1 to 4; "):
        begin.begin(plan, asked, world=world)


@pytest.mark.parametrize("steps", ["[3]", "[0,2]", "[3,2]", "[1,2,3]", "[1,101]"])
def test_what_is_no_range_is_refused(tmp_path: Path, steps: str) -> None:
    with pytest.raises(UserError, match="give the first and the last step to trace, at most 100"):
        load(compose(words(tmp_path, "no", f"log.profile_steps={steps}")))


def test_a_branch_has_the_steps_after_its_parent_s() -> None:
    refuse_outside([11, 12], after=10, last=12)
    with pytest.raises(UserError, match="the steps of the run are 11 to 12"):
        refuse_outside([10, 12], after=10, last=12)
