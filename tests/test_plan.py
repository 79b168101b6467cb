"""Rows planned from indexes of mere lengths: shares, caps, memory, any place at once, the order."""

import hashlib
import json
import pickle
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data import index
from data import source as sources_of
from data.corpus import Corpus
from data.loader import held_out_batches
from data.order import BLOCK_SHARDS
from data.plan import StreamState, plan_places, plan_rows
from data.tokenizer import Tokenizer
from nmm.config import (
    DataConfig,
    ImageConfig,
    Kind,
    Layout,
    MaskingConfig,
    SourceConfig,
    WeightChange,
)
from nmm.errors import UserError
from tests import corpora, lengths

IMAGE = ImageConfig(side_pixels=224, patch_pixels=14)


def configured(directory: Path, **changes: object) -> DataConfig:
    """The 45-45-10 mix as in the paper: a context of 1,024 in rows of 4,096."""
    weights = zip(lengths.KINDS, (0.45, 0.45, 0.10), strict=True)
    sources = {
        kind.value: SourceConfig(
            kind=kind,
            train=f"{directory}/{kind.value}/*.tar",
            held_out=f"{directory}/{kind.value}/*.tar",
            weight=weight,
        )
        for kind, weight in weights
    }
    values: dict = {
        "sources": sources,
        "tokenizer": str(corpora.tokenizer_path()),
        "global_rows": 32,
        "repeat": True,
    }
    return DataConfig(**{**values, **changes})


def opened(config: DataConfig) -> Corpus:
    return Corpus.open(config, image=IMAGE, vocab_size=corpora.VOCAB_SIZE, split="train")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 shards of 500 documents for each kind, as indexes without contents."""
    made = tmp_path_factory.mktemp("lengths")
    for kind in lengths.KINDS:
        lengths.write_indexes(
            made / kind.value,
            kind=kind,
            shards=60,
            documents=500,
            tokenizer=Tokenizer(corpora.tokenizer_path()),
        )
    return made


def served(rows: list, sources: int) -> np.ndarray:
    tokens = np.zeros(sources)
    for row in rows:
        for piece in row:
            tokens[piece.source] += piece.stop - piece.start
    return tokens


def test_rows_are_full_and_cut_no_document_that_fits(directory: Path) -> None:
    """99.5 % for a context of 1,024 in rows of 4,096, over many windows."""
    config = configured(directory)
    corpus = opened(config)
    rows = [row for row, _ in islice(plan_rows(corpus, config), 4000)]
    filled = [sum(piece.stop - piece.start for piece in row) for row in rows]
    assert max(filled) <= 4096
    assert sum(filled) / (4096 * len(rows)) >= 0.995
    pieces = [piece for row in rows for piece in row]
    lengths_of = {}
    for piece in pieces:
        place = (piece.source, piece.shard)
        if place not in lengths_of:
            lengths_of[place] = corpus.sources[piece.source].shards[piece.shard].lengths
        length = lengths_of[place][piece.document]
        assert (piece.start, piece.stop) == (0, length) or length > 1024
    assert max(piece.stop - piece.start for piece in pieces) <= 1024


def test_shares_hold_to_the_row_after_weights_change(directory: Path) -> None:
    """Within 0.1 % at 10M tokens of every stage; the change comes within a few rows of its step."""
    changes = [
        WeightChange(80, {"text": 0.4, "interleaved": 0.2}),
        WeightChange(160, {"caption": 0.2}),
    ]
    config = configured(directory, weight_changes=changes)
    corpus = opened(config)
    stages = [[0.45, 0.45, 0.10], [0.45, 0.2, 0.4], [0.2, 0.2, 0.4]]
    plan = list(islice(plan_rows(corpus, config), 32 * 240))
    for number, weights in enumerate(stages):
        first = next(n for n, (_, state) in enumerate(plan) if state.stage == number)
        assert 0 <= first - 32 * 80 * number <= 8
        rows = [row for row, state in plan if state.stage == number]
        tokens = served(rows, 3)
        assert tokens.sum() > 9_900_000
        assert np.abs(tokens / tokens.sum() - np.array(weights) / sum(weights)).max() < 0.001
    seconds = 0.0
    for at in (100, 32 * 80 - 3, 32 * 80, 32 * 80 + 5, 32 * 160 + 1, 7000):
        stored = json.dumps(plan[at][1].to_dict())
        assert len(stored) < 1024
        started = time.perf_counter()
        left = plan_rows(opened(config), config, StreamState.from_dict(json.loads(stored)))
        found = next(left)
        seconds = max(seconds, time.perf_counter() - started)
        assert [found, *islice(left, 500)] == plan[at + 1 : at + 502]
    assert seconds < 1


def test_rows_before_a_change_of_weights_are_those_without_it(directory: Path) -> None:
    config = configured(directory)
    changed = configured(directory, weight_changes=[WeightChange(200, {"text": 5.0})])
    rows, with_change = (
        [row for row, _ in islice(plan_rows(opened(each), each), 32 * 180)]
        for each in (config, changed)
    )
    assert rows == with_change


def test_any_place_is_reached_by_opening_few_shards(directory: Path) -> None:
    """No replay: a million epochs on, the blocks of one window are all that is read."""
    config = configured(directory)
    corpus = opened(config)
    far = StreamState(
        window=10**6,
        row=17,
        rows=10**9,
        stage=0,
        documents=[10**6 * source.documents + 77 for source in corpus.sources],
        tokens=[10**6 * source.tokens + 1 for source in corpus.sources],
        origin=[10**6 * source.tokens for source in corpus.sources],
    )
    started = time.perf_counter()
    row, state = next(plan_rows(corpus, config, far))
    assert time.perf_counter() - started < 1
    assert (len(row) > 0, state.row) == (True, 18)
    for source in corpus.sources:
        assert len(source.shards._open) <= 2 * BLOCK_SHARDS


def test_memory_neither_follows_the_run_nor_the_corpus(directory: Path, tmp_path: Path) -> None:
    """Peaks of planning a corpus of a quarter of the size, and of four times as many documents."""
    for kind in lengths.KINDS:
        (tmp_path / kind.value).mkdir()
        for path in sorted((directory / kind.value).iterdir()):
            if int(path.name.split("-")[1][:6]) < 15:
                (tmp_path / kind.value / path.name).hardlink_to(path)

    def peak(config: DataConfig, rows: int) -> int:
        """Bytes; the lesser of two, because Python's table of all names may grow during one."""
        return min(peak_of_one(config, rows), peak_of_one(config, rows))

    def peak_of_one(config: DataConfig, rows: int) -> int:
        """Bytes; files mapped into memory do not count, which the system takes back at will."""
        tracemalloc.start()
        corpus = opened(config)
        for window, row in islice(plan_places(corpus, config), rows):
            if row % 8 == 0:
                assert len(window.row(row)) > 0
        for source in corpus.sources:
            assert len(source.shards._open) <= sources_of.OPEN_SHARDS
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = configured(tmp_path), configured(directory)
    assert opened(large).sources[0].documents == 4 * opened(small).sources[0].documents
    peak(small, 100)  # what the first use of a module allocates
    short, long = peak(large, 1200), peak(large, 4800)
    assert long < 1.05 * short
    assert short < 1.05 * peak(small, 1200) + 500 * 3 * 45


def test_opening_reads_only_totals(directory: Path) -> None:
    config = configured(directory)
    started = time.perf_counter()
    corpus = opened(config)
    assert time.perf_counter() - started < 180 * 0.002
    for source in corpus.sources:
        assert source.shards._open == {}
        read = [shard.lengths for shard in source.shards]
        assert source.tokens == sum(int(each.sum()) for each in read)
        assert source.longest == max(int(each.max()) for each in read)
        assert source.documents == sum(map(len, read))
        assert source.images == sum(shard.index.images for shard in source.shards)
        assert len(source.shards._open) == sources_of.OPEN_SHARDS


def test_another_process_opens_its_own_indexes(directory: Path) -> None:
    config = configured(directory)
    corpus = opened(config)
    unused = pickle.dumps(corpus)
    rows = list(islice(plan_rows(corpus, config), 50))
    sent = pickle.dumps(corpus)
    assert len(sent) == len(unused)
    assert list(islice(plan_rows(pickle.loads(sent), config), 50)) == rows


def test_an_index_that_changes_under_a_run_stops_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(corpora.tokenizer_path())
    for kind in lengths.KINDS:
        lengths.write_indexes(
            tmp_path / kind.value, kind=kind, shards=1, documents=20, tokenizer=tokenizer
        )
    corpus = opened(configured(tmp_path))
    shard = tmp_path / "text" / "text-000000.tar"
    stored = index.load(shard, layout=Layout(Kind.text), tokenizer=tokenizer)
    other = replace(stored, crc=stored.crc ^ 1)
    totals = replace(stored.totals, digest=index._digest(vars(other)))
    replace(other, totals=totals).save(shard)
    with pytest.raises(UserError, match=r"text-000000\.tar was indexed again with another result"):
        next(plan_rows(corpus, configured(tmp_path)))


def tiny(directory: Path) -> None:
    """Lengths by formulas: what this corpus holds depends on no generator and no library."""
    hash_of_tokenizer = Tokenizer(corpora.tokenizer_path()).hash
    for number, kind in enumerate(lengths.KINDS):
        (directory / kind.value).mkdir(parents=True)
        for shard in range(20):
            size = 5 + (7 * shard + number) % 11
            text = [3 + (31 * i * i + 17 * shard + 5 * number) % 200 for i in range(size)]
            images = [[0], [1], [0, 1, 3]][kind is Kind.caption or 2 * (kind is Kind.interleaved)]
            parts = [
                [-1, tokens] * images[(i + shard) % len(images)] or [tokens]
                for i, tokens in enumerate(text)
            ]
            made = index.assemble(
                layout=Layout(kind),
                tokenizer_hash=hash_of_tokenizer,
                shard_bytes=512 * size,
                dropped=[],
                segment=np.array([segment for part in parts for segment in part], np.int32),
                border=np.cumsum([0, *map(len, parts)]),
                start=512 * np.arange(size),
                stop=512 * np.arange(1, size + 1),
                variant=np.zeros(size, np.int32),
                skipped=np.zeros(size, np.int32),
                crc=np.zeros(size, np.uint32),
                key_bytes=np.frombuffer(bytes(range(97, 97 + size)), np.uint8),
                key_border=np.arange(size + 1),
            )
            path = directory / kind.value / f"{kind.value}-{shard:03d}.tar"
            path.write_bytes(bytes(made.shard_bytes))
            made.save(path)


def test_the_first_rows_are_pinned(tmp_path: Path) -> None:
    """Keys and pieces of 400 rows. A change here is an ORDER BREAK and belongs in CHANGELOG.md."""
    tiny(tmp_path)
    config = configured(
        tmp_path,
        context_tokens=300,
        row_tokens=600,
        global_rows=8,
        window_documents=64,
        seed=3,
        weight_changes=[WeightChange(30, {"text": 0.5})],
    )
    corpus = Corpus.open(
        config,
        image=ImageConfig(side_pixels=16, patch_pixels=4),
        vocab_size=corpora.VOCAB_SIZE,
        split="train",
    )
    digest = hashlib.sha256()
    for row, _ in islice(plan_rows(corpus, config), 400):
        for piece in row:
            shard = corpus.sources[piece.source].shards[piece.shard]
            key = f"{shard.name}/{shard.index.key(piece.document)}"
            digest.update(f"{key} {piece.start} {piece.stop}\n".encode())
        digest.update(b"\n")
    assert digest.hexdigest()[:16] == FIRST_ROWS


FIRST_ROWS = "bcf3f900e4c7c33a"


def capped(directory: Path, **caps: float) -> DataConfig:
    config = configured(directory, repeat=False)
    sources = {
        name: replace(source, max_epochs=caps.get(name)) for name, source in config.sources.items()
    }
    return replace(config, sources=sources)


def test_a_source_is_repeated_as_often_as_it_may(tmp_path: Path) -> None:
    """The budget is served to the last token, and no document comes more often than allowed."""
    tiny(tmp_path)
    config = replace(capped(tmp_path, text=2.5, caption=2), context_tokens=300, row_tokens=600)
    corpus = opened(config)
    budget = int(corpus.supply_tokens())
    assert budget > opened(capped(tmp_path)).supply_tokens()
    corpus.check_budget(budget, repeat=False)
    tokens, seen = 0, Counter()
    for row, _ in plan_rows(corpus, config):
        if tokens >= budget:
            break
        tokens += sum(piece.stop - piece.start for piece in row)
        seen.update((piece[:3]) for piece in row if piece.start == 0)
    assert tokens >= budget
    most = [max(n for place, n in seen.items() if place[0] == s) for s in range(3)]
    assert all(n <= cap for n, cap in zip(most, (2, 1, 3), strict=True))
    assert max(most) > 1


def test_a_budget_beyond_a_cap_is_refused_with_its_numbers(directory: Path) -> None:
    config = capped(directory, text=2)
    corpus = opened(config)
    source = corpus.sources[2]
    with pytest.raises(UserError) as refusal:
        corpus.check_budget(40 * source.tokens, repeat=True)
    assert (
        f"text is asked for {4 * source.tokens:,} tokens and has {source.tokens:,}, and "
        f"data.sources.text.max_epochs is 2; raise it" in str(refusal.value)
    )
    corpus.check_budget(int(19.9 * source.tokens), repeat=True)
    late = replace(config, weight_changes=[WeightChange(1, {"text": 9.0})])
    with pytest.raises(UserError, match=r"text is asked for .*max_epochs is 2"):
        opened(late).check_budget(int(19.9 * source.tokens), repeat=True)


def test_caps_and_changes_do_not_touch_the_held_out_rows() -> None:
    config = corpora.config(weight_changes=[WeightChange(1, {"text": 0.2})])
    sources = {
        name: replace(source, max_epochs=3.0, weight=1.0) for name, source in config.sources.items()
    }
    found = []
    for each in (corpora.config(), replace(config, sources=sources)):
        corpus = corpora.open_corpus(each, split="held_out")
        batches = held_out_batches(corpus, each, rows_per_source=10**6, micro_batch=4)
        found.append([(name, [batch.keys for batch in some]) for name, some in batches])
    assert found[0] == found[1]


@pytest.mark.parametrize("masked", [False, True])
def test_held_out_rows_depend_on_their_source_alone(masked: bool) -> None:
    """Wherever it stands in the list, with or without others, also where its rows are cut off."""
    config = corpora.config(masking=MaskingConfig(mean_spans=1.0, sentinels=8))
    names = list(config.sources)
    found: dict[str, list[list[torch.Tensor]]] = {name: [] for name in names}
    for order in (names, names[::-1], *([name] for name in names)):
        each = replace(config, sources={name: config.sources[name] for name in order})
        corpus = corpora.open_corpus(each, split="held_out")
        for number, (name, batches) in enumerate(
            held_out_batches(corpus, each, rows_per_source=3, micro_batch=3, masked=masked)
        ):
            (batch,) = batches
            assert set(batch.source[batch.document > 0].tolist()) == {number}
            found[name].append([batch.tokens, batch.labels, batch.position, batch.pixels])
    for first, *others in found.values():
        assert len(others) == 2
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_a_source_without_documents_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(corpora.tokenizer_path())
    for kind in lengths.KINDS:
        lengths.write_indexes(
            tmp_path / kind.value, kind=kind, shards=1, documents=20, tokenizer=tokenizer
        )
    shard = tmp_path / "text" / "text-000000.tar"
    stored = index.load(shard, layout=Layout(Kind.text), tokenizer=tokenizer)
    replace(stored, totals=replace(stored.totals, documents=0)).save(shard)
    with pytest.raises(
        UserError, match=r"data\.sources\.text\.train is .* its weight of 0.1 can never be served"
    ):
        opened(configured(tmp_path))


def test_a_corpus_without_any_held_out_shard_is_refused() -> None:
    sources = corpora.config().sources
    without = {name: replace(source, held_out=None) for name, source in sources.items()}
    with pytest.raises(UserError, match="held_out: null in every entry"):
        corpora.config(sources=without)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([(5, {"text": 1.0}), (5, {"text": 2.0})], "has step 5 behind step 5"),
        ([(5, {"prose": 1.0})], "gives weights to prose after step 5; name some of caption, int"),
        ([(5, {})], "gives weights to no source after step 5"),
        ([(0, {"text": 1.0})], r"data\.weight_changes\.step is 0; set it above 0"),
        ([(5, {"text": 0.0})], r"gives text the weight 0\.0 after step 5; set it above 0"),
        ([(5, {"text": float("nan")})], "gives text the weight nan after step 5"),
    ],
)
def test_wrong_weight_changes_are_refused(
    changes: list[tuple[int, dict[str, float]]], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        corpora.config(weight_changes=[WeightChange(*change) for change in changes])
