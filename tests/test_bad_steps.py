"""Steps whose gradient is no number: nothing moves, and it is said."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from data.loader import Loader
from nmm import begin, checkpoint, parallel
from nmm.checkpoint import Progress
from nmm.config import Config, compose, load
from nmm.engine import Engine, read_weights
from nmm.errors import UserError
from nmm.log import read_rows
from nmm.parallel import World
from tests import runs

BAD, LAST = 3, 5
# DeepSpeed in this process: parts of torch that it imports and calls are deprecated or renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(reduce_scatter|all_gather_into)_tensor:FutureWarning"),
]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield parallel.start()
    parallel.stop()


def settings(directory: Path, *more: str) -> Config:
    short = (f"schedule.total_steps={LAST}", "schedule.warmup_steps=0", "checkpoint.every_steps=1")
    quiet = ("checkpoint.keep_last=9", "evaluation.at_start=false", "evaluation.every_steps=0")
    name = ("run.name=bad", "log.wandb=off", "data.workers=0")
    arguments = runs.overrides(runs.corpus(), directory, *name, *short, *quiet, *more)
    return load(compose(arguments))


def poison(engine: Engine) -> None:
    """From now on make one number of one gradient of step BAD not a number."""
    model = engine.model.module
    assert isinstance(model, torch.nn.Module)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    def spoil(gradient: Tensor) -> Tensor:
        if (forwards + 1) // 2 != BAD:  # a step has two micro-batches
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[7] = torch.nan
        return spoiled

    model.register_forward_pre_hook(count)
    model.get_parameter("blocks.0.ffn.down.weight").register_hook(spoil)


def poisoned_run(asked: Config, progress: Progress, *, world: World) -> Path:
    """The directory of a run whose step BAD has a gradient that is not a number."""
    plan = begin.make_plan(asked, world=world)
    plan.directory.mkdir()
    engine = train.build_engine(plan, asked, fresh=True, world=world)
    poison(engine)
    loader = Loader(
        plan.corpus,
        asked.data,
        rank=0,
        world=1,
        micro_batch=plan.split.micro_batch,
        workers=0,
    )
    with closing(train.open_log(plan, progress, asked, world=world)) as log:
        train.loop(plan, progress, engine, loader, log, settings=asked, world=world)
    return plan.directory


def weights(directory: Path, *, step: int) -> dict[str, Tensor]:
    return read_weights(directory / "checkpoints", tag=f"step_{step:08d}")


def test_zero_0_stops_before_the_state_advances(world: World, tmp_path: Path) -> None:
    progress = Progress()
    with pytest.raises(UserError, match=rf"step {BAD} has the loss \d.* gradient norm nan;"):
        poisoned_run(settings(tmp_path, "engine=zero0"), progress, world=world)
    directory = tmp_path / "bad"
    rows = read_rows(directory / "losses.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert (progress.step, progress.totals["tokens"]) == (2, rows[-1]["tokens"])
    newest = checkpoint.newest(directory)
    assert newest == directory / "checkpoints" / "step_00000002"
    assert checkpoint.read_progress(newest).stream == progress.stream
    assert all(tensor.isfinite().all() for tensor in weights(directory, step=2).values())


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_other_stages_leave_the_update_out_and_count_it(
    world: World, tmp_path: Path, stage: int, precision: str
) -> None:
    more = (f"engine=zero{stage}", f"engine.precision={precision}")
    progress = Progress()
    directory = poisoned_run(settings(tmp_path, *more), progress, world=world)
    rows = read_rows(directory / "losses.jsonl")
    assert [row["step"] for row in rows] == list(range(1, LAST + 1))
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    before, bad, after = rows[BAD - 2 : BAD + 1]
    counted = [key for key in bad if key.startswith("tokens/") or key in ("tokens", "flops")]
    assert len(counted) == 7
    assert all(bad[key] == before[key] <= after[key] for key in counted)
    assert bad["tokens"] < after["tokens"]
    assert '"grad_norm": null' in (directory / "losses.jsonl").read_text().splitlines()[BAD - 1]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [BAD]
    assert bad["loss"] > 0
    assert bad["labels"] > 0
    old, new = weights(directory, step=BAD - 1), weights(directory, step=BAD)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert not torch.equal(old["head.weight"], weights(directory, step=BAD + 1)["head.weight"])
    assert progress.totals["skipped_steps"] == 1
