"""Steps that go wrong: a gradient that is no number, a window of unreadable documents."""

import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import train
from data.loader import Loader
from data.plan import plan_rows
from data.prepare.index import index_shards
from data.shards import ShardWriter
from nmm import begin, checkpoint, stop
from nmm.checkpoint import Progress
from nmm.config import Config, Kind, Layout, compose, load
from nmm.engine import Engine
from nmm.errors import UserError
from nmm.heartbeat import Heartbeat
from nmm.log import read_rows
from nmm.parallel import World
from nmm.pieces import Stored
from tests import corpora, runs

BAD, LAST = 3, 5
# DeepSpeed in this process: parts of torch that it imports and calls are deprecated or renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(reduce_scatter|all_gather_into)_tensor:FutureWarning"),
]


def settings(directory: Path, *more: str) -> Config:
    short = (f"schedule.total_steps={LAST}", "schedule.warmup_steps=0", "checkpoint.every_steps=1")
    quiet = ("checkpoint.keep_last=9", "evaluation.at_start=false", "evaluation.every_steps=0")
    name = ("run.name=bad", "log.wandb=off", "data.workers=0")
    arguments = runs.overrides(runs.corpus(), directory, *name, *short, *quiet, *more)
    return load(compose(arguments))


def poison(engine: Engine, *, steps: tuple[int, ...]) -> None:
    """From now on make one number of one gradient of some steps not a number."""
    model = engine.model.module
    assert isinstance(model, torch.nn.Module)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    def spoil(gradient: Tensor) -> Tensor:
        if (forwards + 1) // 2 not in steps:  # a step has two micro-batches
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[7] = torch.nan
        return spoiled

    model.register_forward_pre_hook(count)
    model.get_parameter("blocks.0.ffn.down.weight").register_hook(spoil)


def run_here(
    asked: Config, progress: Progress, *, world: World, poisoned: tuple[int, ...] = ()
) -> Path:
    """The directory of a run in this process, in which the `poisoned` steps go wrong."""
    plan = begin.make_plan(asked, world=world)
    plan.directory.mkdir()
    engine = train.build_engine(plan, begin.Beginning(progress), asked, world=world)
    if poisoned:
        poison(engine, steps=poisoned)
    loader = Loader(
        plan.corpus,
        asked.data,
        rank=0,
        world=1,
        micro_batch=plan.split.micro_batch,
        workers=0,
    )
    heartbeat = Heartbeat(plan.directory, rank=0)
    with (
        closing(heartbeat),
        closing(train.open_log(plan, progress, asked, heartbeat=heartbeat, world=world)) as log,
    ):
        stops = stop.Stops(plan.directory, max_minutes=None, world=world)
        uploads = train.open_uploads(plan, log, asked, world=world)
        saving = train.saves(plan, engine, log, uploads, asked, world=world)
        train.loop(
            plan, progress, engine, loader, saving, log, settings=asked, stops=stops, world=world
        )
    return plan.directory


def weights(directory: Path, *, step: int) -> dict[str, Tensor]:
    return dict(Stored(directory / "checkpoints" / f"step_{step:08d}").weights())


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *((stage, "fp32") for stage in (0, 1, 2, 3)),
        *((stage, "bf16") for stage in (1, 2, 3)),
    ],
)
def test_an_update_that_is_no_number_is_left_out_counted_and_logged(
    world: World, tmp_path: Path, stage: int, precision: str
) -> None:
    more = (f"engine=zero{stage}", f"engine.precision={precision}")
    rare = ("log.every_steps=2", "log.signals_every_steps=0")
    progress = Progress()
    asked = settings(tmp_path, *more, *rare)
    directory = run_here(asked, progress, world=world, poisoned=(BAD,))
    rows = read_rows(directory / "losses.jsonl")
    assert [row["step"] for row in rows] == [2, BAD, 4, LAST]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["skipped_in_a_row"] for row in rows] == [0, 1, 0, 0]
    before, bad, after, _ = rows
    counted = [key for key in bad if key.startswith("tokens/") or key in ("tokens", "flops")]
    assert len(counted) == 7
    assert all(bad[key] == before[key] <= after[key] for key in counted)
    assert bad["tokens"] < after["tokens"]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [BAD]
    assert bad["loss"] > 0
    assert bad["labels"] > 0
    old, new = weights(directory, step=BAD - 1), weights(directory, step=BAD)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert not torch.equal(old["head.weight"], weights(directory, step=BAD + 1)["head.weight"])
    (listed,) = read_rows(directory / "skipped.jsonl")
    assert (listed["step"], listed["in_a_row"], listed["grad_norm"]) == (BAD, 1, None)
    assert listed["documents"] == documents(asked, world=world, step=BAD)
    said = (directory / "console.log").read_text()
    assert f"the update of step {BAD} was left out: loss {bad['loss']:.3f}, gradient norm" in said


def documents(asked: Config, *, world: World, step: int) -> list[str]:
    """The keys of a step, by its rows in the plan."""
    plan = begin.make_plan(asked, world=world)
    rows = [row for row, _ in islice(plan_rows(plan.corpus, asked.data), step * 8)][-8:]
    shards = [source.shards for source in plan.corpus.sources]
    pieces = [(shards[piece.source][piece.shard], piece) for row in rows for piece in row]
    return [f"{shard.name}/{shard.index.key(piece.document)}" for shard, piece in pieces]


def test_the_first_update_may_be_left_out(world: World, tmp_path: Path) -> None:
    directory = run_here(settings(tmp_path, "engine=zero0"), Progress(), world=world, poisoned=(1,))
    first, second = read_rows(directory / "losses.jsonl")[:2]
    assert first.keys() == second.keys()
    counted = [key for key in first if key.startswith("tokens/") or key in ("tokens", "flops")]
    assert {first[key] for key in counted} == {0}
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 1)
    assert 0 < second["tokens"] < second["flops"]


def test_several_in_a_row_stop_the_run_with_the_documents(world: World, tmp_path: Path) -> None:
    asked = settings(tmp_path, "engine=zero0", "engine.max_skipped_in_a_row=2")
    progress = Progress()
    with pytest.raises(UserError, match=r"^2 updates in a row, up to step 3, were left") as said:
        run_here(asked, progress, world=world, poisoned=(2, 3, 4))
    directory, last = tmp_path / "bad", documents(asked, world=world, step=3)
    rows, listed = (read_rows(directory / f"{name}.jsonl") for name in ("losses", "skipped"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["documents"] for row in listed] == [documents(asked, world=world, step=2), last]
    assert (
        f"the first are {', '.join(last[:5])}; {directory}/skipped.jsonl lists" in f"{said.value}"
    )
    assert checkpoint.newest(directory) == directory / "checkpoints" / "step_00000002"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of tests/runs.py with 60 unreadable captions to train on, and 2 held out."""
    directory = tmp_path_factory.mktemp("bad") / "corpus"
    shutil.copytree(runs.corpus(), directory)
    rng = np.random.default_rng(0)
    picture = corpora.jpeg(rng, width=256, height=256)
    for name, count in (("train-worse", 60), ("held_out-bad", 2)):
        with ShardWriter(directory / "caption", name=name, documents_per_shard=50) as writer:
            for number in range(count):
                text = corpora.sentence(rng, 5)
                writer.caption(f"half-{number}", image=picture[: len(picture) - 300], text=text)
    shards = sorted((directory / "caption").glob("*.tar"))
    index_shards(shards, layout=Layout(Kind.caption), tokenizer=corpora.tokenizer_path())
    return directory


def bad_settings(corpus: Path, directory: Path, *more: str) -> Config:
    short = ("schedule.total_steps=6", "schedule.warmup_steps=0", "checkpoint.every_steps=99")
    name = ("run.name=bad", "log.wandb=off", "data.workers=0")
    held_out = ("evaluation.every_steps=3", "evaluation.rows_per_source=99")
    return load(compose(runs.overrides(corpus, directory, *name, *short, *held_out, *more)))


def test_a_run_stops_at_a_bad_window_with_the_list(
    world: World, corpus: Path, tmp_path: Path
) -> None:
    """Its windows hold 64 documents, of which a dozen are unreadable captions."""
    with pytest.raises(UserError, match=r"^\d+ of the 64 documents of window 0 could not") as said:
        run_here(bad_settings(corpus, tmp_path), Progress(), world=world)
    listed = [
        row for row in read_rows(tmp_path / "bad" / "quarantine.jsonl") if row["split"] == "train"
    ]
    assert int(str(said.value).split()[0]) == len(listed) > 0.2 * 64
    named = [f"{row['shard']}/{row['key']} (image_decode)" for row in listed]
    assert f"the first are {', '.join(named[:5])}, and {tmp_path}" in str(said.value)
    assert named[5] not in str(said.value)


def test_every_document_is_counted_once_or_listed(
    world: World, corpus: Path, tmp_path: Path
) -> None:
    """The counters of the log against the plan; held-out documents are listed by themselves."""
    asked = bad_settings(corpus, tmp_path, "data.max_bad_fraction=0.5")
    directory = run_here(asked, Progress(), world=world)
    rows, evals, listed = (
        read_rows(directory / f"{name}.jsonl") for name in ("losses", "evals", "quarantine")
    )
    plan = begin.make_plan(asked, world=world)
    planned = [row for row, _ in islice(plan_rows(plan.corpus, asked.data), 6 * 8)]
    pieces = [piece for row in planned for piece in row]
    lost = {
        (row["shard"], row["key"], row["window"], row["window_documents"])
        for row in listed
        if row["split"] == "train"
    }
    is_lost = {}
    for piece in pieces:
        shard = plan.corpus.sources[piece.source].shards[piece.shard]
        key = (shard.name, shard.index.key(piece.document), piece.window, piece.window_documents)
        is_lost[piece] = key in lost
    last, kept = rows[-1], [piece for piece in pieces if not is_lost[piece]]
    starts = [piece for piece in kept if piece.start == 0]
    assert last["documents"] == len(starts)
    assert last["pieces"] == len(kept)
    length = {
        piece: plan.corpus.sources[piece.source].shards[piece.shard].lengths[piece.document]
        for piece in starts
    }
    assert last["cut_documents"] == sum(piece.stop < length[piece] for piece in starts) > 5
    assert last["tokens"] == sum(piece.stop - piece.start for piece in kept)
    assert last["padded_tokens"] == sum(p.stop - p.start for p in pieces) - last["tokens"] > 0
    assert last["dropped/image_decode"] == sum(row["split"] == "train" for row in listed) > 10
    held_out = [(row["step"], row["key"]) for row in listed if row["split"] == "held_out"]
    assert sorted(held_out) == [(step, f"half-{n}") for step in (0, 3, 6) for n in (0, 1)]
    assert [row["dropped"] for row in evals] == [2, 2, 2]
