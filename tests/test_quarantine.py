"""Unreadable documents: counted by window, listed, and too many of one window stop the run."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import train
from data.loader import Loader
from data.plan import plan_rows
from data.prepare.index import index_shards
from data.shards import ShardWriter
from nmm import begin, parallel
from nmm.batch import Dropped
from nmm.checkpoint import Progress
from nmm.config import Config, Kind, Layout, compose, load
from nmm.errors import UserError
from nmm.log import read_rows
from nmm.parallel import World
from nmm.quarantine import ALWAYS_PASS, refuse_bad_windows
from tests import corpora, runs

# DeepSpeed in this process: parts of torch that it imports and calls are deprecated or renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(reduce_scatter|all_gather_into)_tensor:FutureWarning"),
]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield parallel.start()
    parallel.stop()


def bad(window: int, *, count: int, of: int = 1000) -> list[Dropped]:
    return [Dropped("a", "s.tar", f"{n}", "image_decode", window, of) for n in range(count)]


def after(window: int, progress: Progress) -> Progress:
    """The same progress when the stream stands in `window`, written to disk and read again."""
    stored = json.loads(json.dumps(asdict(progress)))
    return Progress(**{**stored, "stream": {"window": window}})


def judge(progress: Progress, dropped: list[Dropped], *, fraction: float, directory: Path) -> None:
    refuse_bad_windows(progress, dropped, max_bad_fraction=fraction, directory=directory)


@pytest.mark.parametrize(
    ("most", "fraction"), [(100, 0.1), (20, 0.02), (10, 0.01), (10, 0.0), (1000, 1.0)]
)
def test_a_window_is_refused_beyond_the_fraction_and_not_below(
    tmp_path: Path, most: int, fraction: float
) -> None:
    """Of 1,000 documents, whatever other windows had, and whenever the run was resumed."""
    progress = after(4, Progress(bad_documents={"3": 5}))
    judge(progress, bad(4, count=most - 1), fraction=fraction, directory=tmp_path)
    progress = after(4, progress)
    judge(progress, bad(4, count=1), fraction=fraction, directory=tmp_path)
    assert progress.bad_documents == {"4": most}
    judge(after(5, progress), bad(5, count=most), fraction=fraction, directory=tmp_path)
    with pytest.raises(UserError) as refusal:
        judge(after(4, progress), bad(4, count=1), fraction=fraction, directory=tmp_path)
    said = str(refusal.value)
    assert said.startswith(f"{most + 1} of the 1000 documents of window 4 could not be read")
    assert f"data.max_bad_fraction is {fraction}" in said
    assert f"{tmp_path / 'quarantine.jsonl'}" in said
    assert "\n" not in said


def test_only_windows_that_go_on_are_remembered(tmp_path: Path) -> None:
    """A long run keeps a few numbers; a step may end one window and begin the next."""
    progress = Progress()
    for window in range(50):
        progress = after(window, progress)
        judge(progress, bad(window, count=3), fraction=0.01, directory=tmp_path)
        assert progress.bad_documents == {str(window): 3}
        progress = after(window + 1, progress)
        both = [*bad(window, count=2), *bad(window + 1, count=1)]
        judge(progress, both, fraction=0.01, directory=tmp_path)
        assert progress.bad_documents == {str(window + 1): 1}
        progress.bad_documents.clear()
    with pytest.raises(UserError, match=r"^11 of the 100 documents of window 50 could"):
        judge(after(51, progress), bad(50, count=11, of=100), fraction=0.1, directory=tmp_path)


def test_a_short_window_is_judged_by_its_own_size(tmp_path: Path) -> None:
    progress = after(0, Progress())
    judge(progress, bad(0, count=30, of=3000), fraction=0.01, directory=tmp_path)
    with pytest.raises(UserError, match=r"^30 of the 2000 documents"):
        judge(after(0, Progress()), bad(0, count=30, of=2000), fraction=0.01, directory=tmp_path)


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


def settings(corpus: Path, directory: Path, *more: str) -> Config:
    short = ("schedule.total_steps=6", "schedule.warmup_steps=0", "checkpoint.every_steps=99")
    name = ("run.name=bad", "log.wandb=off", "data.workers=0")
    held_out = ("evaluation.every_steps=3", "evaluation.rows_per_source=99")
    return load(compose(runs.overrides(corpus, directory, *name, *short, *held_out, *more)))


def run(asked: Config, *, world: World) -> Path:
    plan = begin.make_plan(asked, world=world)
    plan.directory.mkdir()
    engine, progress = train.build_engine(plan, asked, world=world), Progress()
    loader = Loader(
        plan.corpus, asked.data, rank=0, world=1, micro_batch=plan.split.micro_batch, workers=0
    )
    with closing(train.open_log(plan, progress, asked, world=world)) as log:
        train.loop(plan, progress, engine, loader, log, settings=asked, world=world)
    return plan.directory


def test_a_run_stops_at_a_bad_window_with_the_list(
    world: World, corpus: Path, tmp_path: Path
) -> None:
    """Its windows hold 64 documents, of which a dozen are unreadable captions."""
    with pytest.raises(UserError, match=r"^\d+ of the 64 documents of window 0 could not") as said:
        run(settings(corpus, tmp_path), world=world)
    listed = [
        row for row in read_rows(tmp_path / "bad" / "quarantine.jsonl") if row["split"] == "train"
    ]
    assert int(str(said.value).split()[0]) == len(listed) > ALWAYS_PASS
    named = [f"{row['shard']}/{row['key']} (image_decode)" for row in listed]
    assert f"the first are {', '.join(named[:5])}, and {tmp_path}" in str(said.value)
    assert named[5] not in str(said.value)


def test_every_document_is_counted_once_or_listed(
    world: World, corpus: Path, tmp_path: Path
) -> None:
    """The counters of the log against the plan; held-out documents are listed by themselves."""
    asked = settings(corpus, tmp_path, "data.max_bad_fraction=0.5")
    directory = run(asked, world=world)
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
