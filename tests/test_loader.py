"""The same rows for any split of the work, exact resume, nothing lost, every refusal."""

import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.block import Blocks
from data.corpus import Corpus
from data.documents import parse
from data.layout import DOCUMENTS_KEPT, Document, Reader, build, read_document
from data.loader import Loader, held_out_batches
from data.plan import Piece, StreamState, plan_rows
from data.prepare.index import index_shards
from data.shards import ShardWriter
from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.config import DataConfig, Kind, Layout, SourceConfig
from nmm.errors import UserError
from tests import corpora

STEPS = 12
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def config() -> DataConfig:
    return corpora.config()


@pytest.fixture(scope="module")
def corpus(config: DataConfig) -> Corpus:
    return corpora.open_corpus(config)


def steps(
    corpus: Corpus,
    config: DataConfig,
    *,
    count: int = STEPS,
    world: int = 1,
    micro_batch: int = 8,
    **more: object,
) -> list[tuple[list[PackedBatch], dict]]:
    """Steps of all ranks, the micro-batches in the order of their rows: step, micro-batch, rank."""
    values: dict = {"workers": 0, **more}
    loaders = [
        Loader(corpus, config, rank=rank, world=world, micro_batch=micro_batch, **values)
        for rank in range(world)
    ]
    found = []
    for ranks in islice(zip(*loaders, strict=True), count):
        assert all(state == ranks[0][1] for _, state in ranks)
        batches = [
            batch
            for of_all_ranks in zip(*(b for b, _ in ranks), strict=True)
            for batch in of_all_ranks
        ]
        found.append((batches, ranks[0][1]))
    return found


def rows(batches: Iterable[PackedBatch]) -> list[dict]:
    """Every row by itself with its own pixels, so that differently split batches compare."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            own = {
                f.name: getattr(batch, f.name)[row].tolist()
                for f in fields(batch)
                if f.name not in ("pixels", "keys", "dropped", "counts", "image")
            }
            own["keys"] = batch.keys[row]
            numbers = batch.image[row][batch.image[row] > 0].unique().tolist()
            own["image"] = [numbers.index(n) + 1 if n else 0 for n in batch.image[row].tolist()]
            own["pixels"] = batch.pixels[[n - 1 for n in numbers]].tolist()
            found.append(own)
    return found


@pytest.fixture(scope="module")
def reference(corpus: Corpus, config: DataConfig) -> list[tuple[list[PackedBatch], dict]]:
    return steps(corpus, config)


@pytest.mark.parametrize(
    ("world", "micro_batch", "workers"),
    [(1, 2, 0), (2, 4, 0), (2, 1, 0), (4, 2, 0), (4, 1, 0), (1, 8, 2), (2, 2, 2)],
)
def test_rows_do_not_depend_on_how_the_work_is_split(
    world: int, micro_batch: int, workers: int, corpus: Corpus, config: DataConfig, reference: list
) -> None:
    count = 4 if workers else STEPS
    found = steps(
        corpus, config, count=count, world=world, micro_batch=micro_batch, workers=workers
    )
    for (batches, state), (expected, expected_state) in zip(found, reference, strict=False):
        assert len(batches) == 8 // micro_batch
        assert rows(batches) == rows(expected)
        assert state == expected_state
    assert len(found) == count


@pytest.mark.parametrize("world", [1, 2])
def test_every_state_resumes_exactly(
    world: int, corpus: Corpus, config: DataConfig, reference: list
) -> None:
    windows = {state["window"] for _, state in reference}
    assert len(windows) > 2
    for at, (_, state) in enumerate(reference[:-1]):
        stored = json.dumps(state)
        assert len(stored) < 1024
        left = steps(
            corpus,
            config,
            count=min(3, STEPS - 1 - at),
            world=world,
            micro_batch=4,
            state=json.loads(stored),
        )
        assert len(left) > 0
        for (batches, after), (expected, expected_after) in zip(
            left, reference[at + 1 :], strict=False
        ):
            assert rows(batches) == rows(expected)
            assert after == expected_after


def test_a_state_of_eight_ranks_continues_on_three(corpus: Corpus, config: DataConfig) -> None:
    config = replace(config, global_rows=24)
    reference = steps(corpus, config, count=6, world=8, micro_batch=1)
    state = json.loads(json.dumps(reference[2][1]))
    left = steps(corpus, config, count=3, world=3, micro_batch=2, state=state)
    assert [rows(batches) for batches, _ in left] == [rows(batches) for batches, _ in reference[3:]]
    assert [after for _, after in left] == [after for _, after in reference[3:]]


def test_memory_does_not_follow_the_documents_read(corpus: Corpus, config: DataConfig) -> None:
    """Nothing of a document stays: any trace of one would take more than 30 bytes."""
    loader = iter(Loader(corpus, config, rank=0, world=1, micro_batch=8, workers=0))

    def peak(count: int) -> tuple[int, int]:
        """Bytes at most, and documents, of the next `count` steps."""
        tracemalloc.reset_peak()
        keys = sum(len(row) for (batch,), _ in islice(loader, count) for row in batch.keys)
        return tracemalloc.get_traced_memory()[1], keys

    tracemalloc.start()
    try:
        peak(400)
        early, _ = peak(100)
        _, between = peak(300)
        late, _ = peak(100)
    finally:
        tracemalloc.stop()
    assert between > 5000
    assert late < early + 30 * between


def test_documents_are_remembered_within_a_number_of_bytes(
    corpus: Corpus, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [piece for row, _ in islice(plan_rows(corpus, config), 40) for piece in row]

    def most_kept() -> tuple[int, int]:
        """Documents and their bytes, the most after any piece; the last one is always there."""
        reader, most = Reader(corpus, seed=config.seed), (0, 0)
        for piece in pieces:
            found = reader.read(piece)
            assert reader.read(piece) is found
            kept = [each.nbytes for each in reader._kept.values() if isinstance(each, Document)]
            assert reader._bytes == sum(kept)
            most = max(most[0], len(kept)), max(most[1], sum(kept))
        return most

    documents, size = most_kept()
    assert documents == DOCUMENTS_KEPT
    monkeypatch.setattr("data.layout.KEPT_BYTES", size // 4)
    fewer, smaller = most_kept()
    assert 1 < fewer < documents
    assert smaller <= size // 4
    monkeypatch.setattr("data.layout.KEPT_BYTES", 0)
    assert most_kept()[0] == 1


def test_every_row_state_continues_the_plan(corpus: Corpus, config: DataConfig) -> None:
    plan = list(islice(plan_rows(corpus, config), 150))
    for at in range(0, 120, 7):
        state = StreamState.from_dict(plan[at][1].to_dict())
        assert list(islice(plan_rows(corpus, config, state), 20)) == plan[at + 1 : at + 21]


def test_documents_come_once_per_epoch_and_epochs_differ(
    corpus: Corpus, config: DataConfig
) -> None:
    """Pieces of a document cover it without gap in every epoch."""
    whole_windows = takewhile(lambda planned: planned[1].window < 40, plan_rows(corpus, config))
    pieces = [piece for row, _ in whole_windows for piece in row]
    for number, source in enumerate(corpus.sources):
        seen: dict[tuple, Counter] = {}
        for piece in pieces:
            if piece.source == number:
                seen.setdefault(piece[1:3], Counter())[piece[3:5]] += 1
        everything = {
            (s, d) for s, shard in enumerate(source.shards) for d in range(len(shard.index))
        }
        assert set(seen) == everything
        for (shard, document), cuts in seen.items():
            assert max(cuts.values()) - min(cuts.values()) <= 1
            length = int(source.shards[shard].lengths[document])
            assert [start for start, _ in sorted(cuts)] == [
                0,
                *(stop for _, stop in sorted(cuts)[:-1]),
            ]
            assert max(cuts)[1] == length
            assert (len(cuts) == 1) == (length <= config.context_tokens)


def test_pieces_know_their_epoch_and_their_window(corpus: Corpus, config: DataConfig) -> None:
    """Epochs follow each other, each with every document once; windows hold what they say."""
    planned = ((row, s.window - (s.row == 0)) for row, s in plan_rows(corpus, config))
    rows = list(takewhile(lambda of_window: of_window[1] < 30, planned))
    of_window: dict[int, set] = {}
    for row, window in rows:
        for piece in row:
            assert piece.window == window
            place = (*piece[:3], piece.epoch)
            of_window.setdefault(window, set()).add((*place, piece.window_documents))
    for window, places in of_window.items():
        assert {size for *_, size in places} == {len(places)}, window
    pieces = [piece for row, _ in rows for piece in row]
    assert len(set(pieces)) == len(pieces)
    assert max(piece.epoch for piece in pieces) > 2
    for number, source in enumerate(corpus.sources):
        for epoch in range(max(piece.epoch for piece in pieces if piece.source == number)):
            here = (number, epoch, 0)
            first = Counter(p[:3] for p in pieces if (p.source, p.epoch, p.start) == here)
            assert len(first) == source.documents
            assert set(first.values()) == {1}


def test_tokens_and_labels_are_conserved(config: DataConfig) -> None:
    """One epoch of each source: every text token, image, end and label is there once."""
    corpus = corpora.open_corpus(config)
    once = replace(config, repeat=False)
    for number, source in enumerate(corpus.sources):
        alone = corpus.alone(number)
        plan = [row for row, _ in plan_rows(alone, once)]
        batch = build(
            plan,
            reader=Reader(alone, seed=config.seed),
            row_tokens=config.row_tokens,
            blocks=Blocks(),
        )
        assert int((batch.modality == Modality.image).sum()) == source.images * corpora.IMAGE.tokens
        assert (
            int((batch.modality == Modality.text).sum())
            == source.text_tokens + 2 * source.documents
        )
        assert len(batch.pixels) == source.images
        assert batch.image.max() == source.images
        assert dict(Counter(key for row in batch.keys for key in row)).keys() == {
            f"{shard.name}/{shard.index.key(i)}"
            for shard in source.shards
            for i in range(len(shard.index))
        }
        assert int((batch.labels != NO_LABEL).sum()) == source.text_tokens + source.documents
        text = Counter(batch.tokens[batch.modality == Modality.text].tolist())
        text[corpus.tokenizer.ids.bos] = 0  # a begin follows nothing, so nobody predicts it
        assert Counter(batch.labels[batch.labels != NO_LABEL].tolist()) == +text
        padding = batch.document == 0
        assert bool((batch.modality[padding] == 0).all())
        assert bool((batch.labels[padding] == NO_LABEL).all())
        assert bool((batch.tokens[padding] == corpus.tokenizer.ids.pad).all())


def test_the_layout_is_that_of_the_contract(corpus: Corpus) -> None:
    """A caption and a text in one row, as PackedBatch draws it, with images of 16 tokens."""
    caption, text = corpus.sources[0].shards[0], corpus.sources[2].shards[0]
    first, second = int(caption.lengths[0]), int(text.lengths[1])
    plan = [[Piece(0, 0, 0, 0, first), Piece(2, 0, 1, 0, second)]]
    batch = build(
        plan, reader=Reader(corpus, seed=0), row_tokens=first + second + 5, blocks=Blocks()
    )
    ids = corpus.tokenizer.ids
    words = corpus.tokenizer.encode(_text(corpus, source=0, document=0))
    prose = corpus.tokenizer.encode(_text(corpus, source=2, document=1))
    image = [ids.image] * 16
    assert batch.tokens[0].tolist() == [
        ids.bos,
        *image,
        *words,
        ids.eos,
        ids.bos,
        *prose,
        ids.eos,
        *[ids.pad] * 5,
    ]
    assert batch.labels[0].tolist() == [
        *[NO_LABEL] * 16, *words, ids.eos, NO_LABEL, *prose, ids.eos, NO_LABEL, *[NO_LABEL] * 5
    ]  # fmt: skip
    assert batch.document[0].tolist() == [1] * first + [2] * second + [0] * 5
    assert batch.source[0].tolist() == [0] * first + [2] * second + [0] * 5
    assert batch.image[0].tolist() == [0] + [1] * 16 + [0] * (first + second + 5 - 17)
    assert batch.position[0].tolist() == [*range(first), *range(second), *[0] * 5]
    assert batch.modality[0].tolist() == [1] + [2] * 16 + [1] * (first + second - 17) + [0] * 5
    assert batch.keys == [[f"{caption.name}/000000", f"{text.name}/000001"]]
    types = {
        f.name: getattr(batch, f.name).dtype
        for f in fields(batch)
        if f.name not in ("keys", "dropped", "counts")
    }
    assert types == {
        **dict.fromkeys(("tokens", "labels"), torch.int64),
        **dict.fromkeys(("document", "image", "position"), torch.int32),
        **dict.fromkeys(("modality", "label_modality", "source", "pixels"), torch.uint8),
    }


def _text(corpus: Corpus, *, source: int, document: int) -> str:
    chosen = corpus.sources[source]
    parts = parse(chosen.layout, read_document(chosen.shards[0], document)).parts
    return next(part for part in parts if isinstance(part, str))


def test_pieces_of_a_long_document_keep_their_labels(corpus: Corpus, config: DataConfig) -> None:
    """Pieces laid side by side are the uncut document, except for positions and its number."""
    corpus = corpus.alone(1)
    (source,) = corpus.sources
    shard, number = source.shards[0], int(source.shards[0].lengths.argmax())
    length = int(shard.lengths[number])
    plan = islice(plan_rows(corpus, replace(config, repeat=False)), 10**6)
    cuts = sorted(p for row, _ in plan for p in row if (p.shard, p.document) == (0, number))
    assert len(cuts) > 2
    whole = build(
        [[Piece(0, 0, number, 0, length)]],
        reader=Reader(corpus, seed=config.seed),
        row_tokens=length,
        blocks=Blocks(),
    )
    cut = build([cuts], reader=Reader(corpus, seed=config.seed), row_tokens=length, blocks=Blocks())
    for name in ("tokens", "labels", "modality", "image", "pixels"):
        assert torch.equal(getattr(whole, name), getattr(cut, name)), name
    assert cut.document[0].unique().tolist() == list(range(1, len(cuts) + 1))
    assert cut.position[0].tolist() == [
        p for piece in cuts for p in range(piece.stop - piece.start)
    ]
    single = build(
        [[cuts[-1]]], reader=Reader(corpus, seed=config.seed), row_tokens=64, blocks=Blocks()
    )
    used = cuts[-1].stop - cuts[-1].start
    assert torch.equal(single.tokens[0, :used], whole.tokens[0, -used:])
    assert single.image.max() == len(single.pixels)


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Corpus, DataConfig]:
    """Captions and long stories; one caption's image is truncated, and a story's last one."""
    rng = np.random.default_rng(0)
    good = [corpora.jpeg(rng, width=40, height=40) for _ in range(6)]
    half = good[0][:-20]
    for split in ("train", "held_out"):
        with ShardWriter(tmp_path / "caption", name=split, documents_per_shard=100) as writer:
            for n in range(20):
                writer.caption(
                    f"{n}", image=half if n == 7 else good[0], text=corpora.sentence(rng, 5)
                )
        with ShardWriter(tmp_path / "interleaved", name=split, documents_per_shard=100) as writer:
            for n in range(10):
                images = [*good[:5], half if n == 3 else good[5]]
                writer.interleaved(
                    f"{n}", [p for image in images for p in (image, corpora.sentence(rng, 9))]
                )
    for kind in (Kind.caption, Kind.interleaved):
        shards = sorted((tmp_path / kind.value).glob("*.tar"))
        index_shards(shards, layout=Layout(kind), tokenizer=corpora.tokenizer_path())
    config = corpora.config(tmp_path, global_rows=1, window_documents=7)
    del config.sources["text"]
    return corpora.open_corpus(config), config


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_document_keeps_its_place_as_padding(
    workers: int, damaged: tuple[Corpus, DataConfig]
) -> None:
    corpus, config = damaged
    plan = [row for row, _ in islice(plan_rows(corpus, config), 60)]
    loader = Loader(corpus, config, rank=0, world=1, micro_batch=1, workers=workers)
    found = [batch for (batch,), _ in islice(loader, len(plan))]
    bad = {(0, 7), (1, 3)}
    for row, batch in zip(plan, found, strict=True):
        stop = 0
        for piece in row:
            start, stop = stop, stop + piece.stop - piece.start
            is_bad = (piece.source, piece.document) in bad
            assert bool((batch.document[0, start:stop] == 0).all()) == is_bad
            assert bool((batch.labels[0, start:stop] == NO_LABEL).all()) >= is_bad
        assert len(batch.keys[0]) == batch.document.max()
        listed = [(d.source, d.shard, d.key, d.reason) for d in batch.dropped]
        assert listed == [
            (corpus.sources[p.source].name, "train-000000.tar", f"{p.document}", "image_decode")
            for p in row
            if (p.source, p.document) in bad and p.start == 0
        ]
    served = [p for row in plan for p in row if (p.source, p.document) in bad]
    assert {p.source for p in served} == {0, 1}
    assert len({p.start for p in served}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_changed_shard_stops_the_run_with_a_sentence(workers: int, tmp_path: Path) -> None:
    shutil.copytree(corpora.corpus_directory(), tmp_path / "corpus")
    config = corpora.config(tmp_path / "corpus")
    corpus = corpora.open_corpus(config)
    for shard in (tmp_path / "corpus" / "text").glob("train-*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    loader = Loader(corpus, config, rank=0, world=1, micro_batch=8, workers=workers)
    with pytest.raises(
        UserError, match=r"^[^\n]*train-\d+\.tar has changed since it was indexed[^\n]*$"
    ):
        list(islice(loader, 20))


def test_counts_that_differ_from_the_index_stop_the_run(corpus: Corpus) -> None:
    shard = corpus.sources[0].shards[0]
    other = replace(shard.index, segment=shard.index.segment + (shard.index.segment > 0))
    shards = [replace(shard, index=other), *corpus.sources[0].shards[1:]]
    changed = replace(corpus, sources=[replace(corpus.sources[0], shards=shards)])
    with pytest.raises(
        UserError, match="document 000000 has other token counts than its index says"
    ):
        build(
            [[Piece(0, 0, 0, 0, int(shard.lengths[0]))]],
            reader=Reader(changed, seed=0),
            row_tokens=128,
            blocks=Blocks(),
        )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_process_that_is_killed_is_named_as_killed(corpus: Corpus, config: DataConfig) -> None:
    """Whatever torch was doing with it; its handler of SIGCHLD may speak before us, and as well."""
    said = []

    def kill_and_read_on(loader: Iterable) -> None:
        multiprocessing.active_children()[0].kill()
        for _ in loader:
            pass

    for wait_seconds in (0, 0.05, 0.3):
        loader = iter(Loader(corpus, config, rank=0, world=1, micro_batch=2, workers=1))
        next(loader)
        time.sleep(wait_seconds)
        with pytest.raises((UserError, RuntimeError), match="killed by signal") as caught:
            kill_and_read_on(loader)
        said.append(str(caught.value))
    assert any("signal 9" in each and "lower data.workers" in each for each in said)


HANDS_OVER = """
import os
from multiprocessing import current_process
from multiprocessing.connection import Client
from multiprocessing.resource_sharer import DupFd as Shared
from data.workers import outlive_signals
outlive_signals(0, parent=os.getppid())
shared = Shared(0)
Client(shared._id[0], authkey=current_process().authkey).close()
os.close(shared.detach())  # the thread has come to the one after
"""


def test_a_helper_whose_parent_was_killed_says_nothing_of_it() -> None:
    """Whoever asked for a batch is gone in the middle of the thread's answer."""
    command = [sys.executable, "-c", HANDS_OVER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


LEFT_ALONE = """
import os, time
from data.workers import outlive_signals, shielded
parent = os.getpid()
with shielded():
    if os.fork() == 0:
        outlive_signals(0, parent=parent)
        print(os.getpid(), flush=True)
        time.sleep(1000)
os.wait()
"""


def test_a_helper_goes_when_its_parent_was_killed() -> None:
    """It holds copies of the parent's connections, whose other ends learn of the death by that."""
    command = [sys.executable, "-c", LEFT_ALONE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as parent:
        assert parent.stdout
        helper = int(parent.stdout.readline())
        parent.kill()
        closed, _, _ = select.select([parent.stdout], [], [], 100)
        if not closed:
            os.kill(helper, signal.SIGKILL)
        assert closed


def test_held_out_rows_are_fixed_and_dealt_to_ranks(config: DataConfig) -> None:
    corpus = corpora.open_corpus(config, split="held_out")

    def held_out(
        data: DataConfig, *, rows_per_source: int = 5, micro_batch: int = 4, **more: int
    ) -> dict:
        found = held_out_batches(
            corpus,
            data,
            rows_per_source=rows_per_source,
            micro_batch=micro_batch,
            **more,
        )
        return {name: list(batches) for name, batches in found}

    alone = held_out(config)
    assert list(alone) == ["caption", "interleaved", "text"]
    for number, (name, batches) in enumerate(alone.items()):
        assert [len(batch.tokens) for batch in batches] == [4, 4]
        assert bool((batches[1].document[1:] == 0).all())
        assert set(batches[0].source[batches[0].document > 0].tolist()) == {number}
        again = held_out(replace(config, seed=99, repeat=False), rows_per_source=5, micro_batch=1)[
            name
        ]
        assert rows(again) == rows(batches)[:5]
        ranks = [held_out(config, micro_batch=1, rank=rank, world=2)[name] for rank in (0, 1)]
        dealt = [batch for pair in zip(*ranks, strict=True) for batch in pair]
        assert rows(dealt) == rows(batches)[:6]
    everything = held_out(config, rows_per_source=10**6)
    for source in corpus.sources:
        counts = [int((batch.document > 0).sum()) for batch in everything[source.name]]
        assert sum(counts) == source.tokens


def test_the_supply_is_served_without_repetition(corpus: Corpus, config: DataConfig) -> None:
    once = replace(config, repeat=False)
    plan = [row for row, _ in plan_rows(corpus, once)]
    served = sum(piece.stop - piece.start for row in plan for piece in row)
    supply = corpus.supply_tokens()
    assert 0.8 * served < supply <= served
    assert len(plan) * config.row_tokens >= supply
    corpus.check_budget(supply, repeat=False)
    corpus.check_budget(supply + 1, repeat=True)
    with pytest.raises(
        UserError,
        match=rf"needs {supply + 1:,} tokens but the corpus serves {supply:,} .*data.repeat",
    ):
        corpus.check_budget(supply + 1, repeat=False)
    loader = Loader(corpus, once, rank=0, world=1, micro_batch=8, workers=0)
    with pytest.raises(AssertionError, match="the corpus has ended"):
        list(loader)


def test_the_fingerprint_follows_content_and_not_place(
    tmp_path: Path, corpus: Corpus, config: DataConfig
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpora.corpus_directory(), moved)
    assert corpora.open_corpus(corpora.config(moved)).fingerprint == corpus.fingerprint
    assert corpora.open_corpus(config, split="held_out").fingerprint != corpus.fingerprint
    with ShardWriter(moved / "text", name="train", documents_per_shard=100) as writer:
        writer.text("0", "other words.")
    index_shards(
        sorted((moved / "text").glob("*.tar")),
        layout=Layout(Kind.text),
        tokenizer=corpora.tokenizer_path(),
    )
    assert corpora.open_corpus(corpora.config(moved)).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        (
            "{}/text/nothing-*.tar",
            r"data\.sources\.a\.train is .*nothing-\*\.tar, which matches no shard",
        ),
        (
            "{}/nowhere/*.tar",
            r"the directory .*nowhere does not exist.*python -m data\.prepare\.demo",
        ),
        (
            "{}/caption/train-*.tar",
            r"is stale: its kind is caption, now it is text; run `python -m data",
        ),
    ],
)
def test_a_wrong_corpus_is_refused(pattern: str, sentence: str) -> None:
    path = pattern.format(corpora.corpus_directory())
    source = SourceConfig(kind=Kind.text, train=path, held_out=path, weight=1.0)
    with pytest.raises(UserError, match=sentence):
        corpora.open_corpus(corpora.config(sources={"a": source}))


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    path = str(tmp_path / "*.tar")
    source = SourceConfig(kind=Kind.text, train=path, held_out=path, weight=1.0)
    with pytest.raises(UserError, match=r"x\.tar is empty \(0 bytes\)"):
        corpora.open_corpus(corpora.config(sources={"a": source}))


def test_a_split_that_cannot_be_made_is_refused(corpus: Corpus, config: DataConfig) -> None:
    with pytest.raises(
        UserError, match=r"data.global_rows is 8, which 2 processes with engine.micro_batch=3"
    ):
        Loader(corpus, config, rank=0, world=2, micro_batch=3, workers=0)
