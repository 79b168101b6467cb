"""Masked spans: everything stays, images whole, planned exactly, and drawn from the place alone."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest

from data.block import Blocks
from data.layout import Document, Reader, build
from data.loader import held_out_batches
from data.masking import borders, masked, spans_of, wanted
from data.plan import Piece, plan_rows
from data.sequences import Sequence, sequence
from data.tokenizer import IdTable, MaskIds, Tokenizer
from data.units import Units
from nmm.batch import NO_LABEL, Modality
from nmm.config import DataConfig, Kind, MaskingConfig, UnitModality
from nmm.errors import UserError
from nmm.held_out import objective
from tests import corpora, test_units
from tests.test_loader import rows, steps

SENTINELS = 6
MASKING = MaskingConfig(mean_spans=1.5, sentinels=SENTINELS)
CODES = 16


def table() -> IdTable:
    units = {UnitModality.image: CODES, UnitModality.speech: 40}
    return Tokenizer(corpora.tokenizer_path(), units=units, sentinels=SENTINELS).ids


def masks(ids: IdTable) -> MaskIds:
    assert ids.masks is not None
    return ids.masks


def reassembled(tokens: list[int], ids: MaskIds) -> list[int]:
    """The document's own order, read off the tokens alone."""
    spans: dict[int, list[int]] = {}
    while tokens[-1] == ids.end:
        name = next(name for name in range(ids.first, ids.first + ids.count) if name not in spans)
        names = [name for name in tokens if ids.first <= name < ids.first + ids.count]
        name = max(name for name in names if name not in spans)
        at = len(tokens) - 1 - tokens[::-1].index(name)
        spans[name] = tokens[at + 1 : -1]
        tokens = tokens[:at]
    return [token for one in tokens for token in spans.pop(one, [one])]


def test_the_ids_of_masks_follow_all_others() -> None:
    units = {UnitModality.image: CODES, UnitModality.speech: 40}
    plain, ids = Tokenizer(corpora.tokenizer_path(), units=units).ids, table()
    assert replace(ids, masks=None, size=plain.size) == plain
    assert masks(ids) == MaskIds(end=plain.size, count=SENTINELS)
    assert (masks(ids).first, ids.size) == (plain.size + 1, plain.size + 1 + SENTINELS)
    with pytest.raises(UserError, match=rf"needs {ids.size} ids with data\.units and data\.mask"):
        Tokenizer(corpora.tokenizer_path(), units=units, sentinels=SENTINELS).check_capacity(
            ids.size - 1
        )


def test_the_drawn_piece() -> None:
    """b x y z w e with x and z masked: no sentinel is predicted, everything else is, and ends."""
    ids = table()
    end, first = masks(ids).end, masks(ids).first
    plain = sequence([[11, 12, 13, 14]], ids, image_tokens=4)
    found = masked(plain, [(1, 2), (3, 4)], ids=masks(ids))
    in_place = [ids.bos, first, 12, first + 1, 14, ids.eos]
    assert found.tokens.tolist() == [*in_place, first, 11, end, first + 1, 13, end]
    no = NO_LABEL
    assert found.labels.tolist() == [no, 12, no, 14, ids.eos, no, 11, end, no, 13, end, no]
    text = int(Modality.text)
    assert found.label_modality.tolist() == [
        text if label != NO_LABEL else 0 for label in found.labels.tolist()
    ]
    assert set(found.modality.tolist()) == {text}


def random_document(rng: np.random.Generator, ids: IdTable) -> Sequence:
    """Texts, images of patches or of codes, and speech, some of them next to each other."""
    modality = Modality(rng.choice([Modality.image, Modality.speech]))
    texts = []
    for kind in rng.choice(["text", "patches", "units"], rng.integers(1, 7)):
        size = int(rng.integers(1, 9))
        values = rng.integers(0, CODES, size)
        texts.append({"text": values + 4, "patches": None, "units": Units(values)}[kind])
    return sequence(texts, ids, image_tokens=5, modality=modality)


def test_pieces_reassemble_and_lose_nothing() -> None:
    """Tokens, labels with their modalities, and whole images, in 400 documents of every kind."""
    ids, rng = table(), np.random.default_rng(0)
    checked = 0
    for number in range(400):
        plain = random_document(rng, ids)
        count = min(int(rng.integers(1, 4)), len(borders(plain)) // 2)
        if not count:
            continue
        spans = spans_of(number, plain, start=0, count=count)
        assert len(spans) == count
        found = masked(plain, spans, ids=masks(ids))
        assert reassembled(found.tokens.tolist(), masks(ids)) == plain.tokens.tolist()
        labels = list(zip(found.labels.tolist(), found.label_modality.tolist(), strict=True))
        ends = Counter({(masks(ids).end, int(Modality.text)): count})
        wanted_labels = Counter(
            zip(plain.labels.tolist(), plain.label_modality.tolist(), strict=True)
        )
        assert Counter(labels) == wanted_labels + ends + Counter({(NO_LABEL, 0): 2 * count})
        # What is predicted is what stands next; a sentinel never is.
        for at, label in enumerate(found.labels[:-1]):
            assert label in (NO_LABEL, found.tokens[at + 1])
        assert not (found.labels >= masks(ids).first).any()
        for image in range(1, int(plain.image.max(initial=0)) + 1):
            assert np.diff(np.flatnonzero(found.image == image)).tolist() == [1] * 4
        codes = ids.units[Modality.image]
        begins, stops = (np.flatnonzero(found.tokens == x) for x in (codes.begin, codes.end))
        for begin, stop in zip(begins, stops, strict=True):
            assert (found.modality[begin + 1 : stop] == Modality.image).all()
        checked += 1
    assert checked > 300


def test_the_number_of_spans_is_poisson_and_their_ends_are_uniform() -> None:
    keys = np.arange(40_000, dtype=np.uint64) * np.uint64(7919)
    drawn = wanted(keys, np.zeros(len(keys), np.int64), config=MaskingConfig(1.0, 512))
    shares = np.bincount(drawn)[:4] / len(keys)
    assert shares == pytest.approx([0.3679, 0.3679, 0.1839, 0.0613], abs=0.01)
    few = wanted(keys, np.zeros(len(keys), np.int64), config=MaskingConfig(9.0, 2))
    assert few.max() == 2
    other = wanted(keys, np.full(len(keys), 64), config=MaskingConfig(1.0, 512))
    assert (drawn == other).mean() == pytest.approx(sum(np.square([0.368, 0.368, 0.184])), abs=0.02)
    plain = sequence([np.arange(4, 12)], table(), image_tokens=4)  # 9 borders
    ends = Counter(spans_of(number, plain, start=0, count=1)[0] for number in range(7200))
    assert len(ends) == 36  # every pair
    assert sum((count - 200) ** 2 / 200 for count in ends.values()) < 60  # chi-square of 35


def configured(**changes: object) -> DataConfig:
    return corpora.config(masking=MASKING, **changes)


def test_rows_are_as_long_as_planned_and_hold_the_documents() -> None:
    """Long documents, too: pieces fit the context with their spans, and join to the document."""
    config = configured(window_documents=400, row_tokens=256)
    corpus = corpora.open_corpus(config)
    plain = corpora.open_corpus(replace(config, masking=MaskingConfig()))
    ids, reader = masks(corpus.tokenizer.ids), Reader(corpus, seed=config.seed)
    window = takewhile(
        lambda row: row[0].window == 0, (row for row, _ in plan_rows(corpus, config))
    )
    plan = list(window)
    assert max(piece.tokens for row in plan for piece in row) <= config.context_tokens
    assert np.mean([sum(p.tokens for p in row) for row in plan]) > 0.985 * config.row_tokens
    spans = Counter(piece.spans for row in plan for piece in row)
    assert spans[0] < 0.6 * spans.total()
    assert min(spans[n] for n in (1, 2, 3)) > 5
    joined: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for row in plan:
        batch = build([row], reader=reader, row_tokens=config.row_tokens, blocks=Blocks())
        used = int((batch.modality != Modality.pad).sum())
        assert used == sum(piece.tokens for piece in row)
        stop = 0
        for piece in row:
            start, stop = stop, stop + piece.tokens
            own = reassembled(batch.tokens[0, start:stop].tolist(), ids)
            joined.setdefault((*piece[:3], piece.epoch), []).append((piece.start, own))
        images = batch.image[batch.image > 0].unique().tolist()
        assert images == list(range(1, len(batch.pixels) + 1))
    known = Reader(plain, seed=config.seed)
    for (source, shard, number, epoch), parts in joined.items():
        document = known.read(Piece(source, shard, number, 0, 1, epoch))
        assert isinstance(document, Document)
        tokens = document.sequence.tokens.tolist()
        assert all(own == tokens[start : start + len(own)] for start, own in parts)
        assert sum(len(own) for _, own in parts) == len(tokens)
    assert len(joined) == 400


def test_pixels_follow_their_images() -> None:
    """Where an image moves, its pixels are still its own."""
    config = configured(context_tokens=128)
    corpus = corpora.open_corpus(config)
    reader, moved = Reader(corpus, seed=config.seed), 0
    for row, _ in islice(plan_rows(corpus, config), 90):
        batch = build([row], reader=reader, row_tokens=config.row_tokens, blocks=Blocks())
        stop = 0
        for piece in row:
            start, stop = stop, stop + piece.tokens
            document = reader.read(piece)
            assert isinstance(document, Document)
            here = reader.part(document, piece).image
            for number in np.unique(here[here > 0]).tolist():
                at = start + int(np.flatnonzero(here == number)[0])
                shown = batch.pixels[int(batch.image[0, at]) - 1].numpy()
                assert np.array_equal(shown, document.pixels[number - 1])
            moved += bool((np.diff(here[here > 0]) < 0).any())
    assert moved > 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_rows_do_not_depend_on_who_reads_them_or_where_a_run_goes_on() -> None:
    config = configured()
    corpus = corpora.open_corpus(config)
    read = partial(steps, corpus, config, count=6)
    whole = read(world=1, micro_batch=8, workers=0)
    expected = rows(batch for batches, _ in whole for batch in batches)
    split = read(world=4, micro_batch=2, workers=0)
    assert rows(batch for batches, _ in split for batch in batches) == expected
    helped = read(world=2, micro_batch=2, workers=2, state=whole[2][1], count=3)
    assert rows(batch for batches, _ in helped for batch in batches) == expected[3 * 8 :]


def test_another_seed_and_another_epoch_mask_other_spans() -> None:
    config = configured()
    corpus = corpora.open_corpus(config)
    reader = Reader(corpus, seed=1)
    number = int(np.argmax(corpus.sources[2].shards[0].lengths))

    def drawn(reader: Reader, *, epoch: int) -> list[int]:
        piece = Piece(2, 0, number, 0, 40, epoch, spans=2)
        document = reader.read(piece)
        assert isinstance(document, Document)
        return reader.part(document, piece).tokens.tolist()

    found = [drawn(reader, epoch=0), drawn(reader, epoch=1), drawn(Reader(corpus, seed=2), epoch=0)]
    assert found[0] == drawn(Reader(corpus, seed=1), epoch=0)
    assert len({tuple(tokens) for tokens in found}) == 3


def test_held_out_documents_are_in_order_unless_asked() -> None:
    config = configured()
    held_out = corpora.open_corpus(config, split="held_out")
    first = masks(held_out.tokenizer.ids).first
    read = partial(held_out_batches, held_out, rows_per_source=4, micro_batch=4)
    off = replace(config, masking=MaskingConfig())
    plain = held_out_batches(
        corpora.open_corpus(off, split="held_out"), off, rows_per_source=4, micro_batch=4
    )
    for (_, ours), (_, theirs) in zip(read(config), plain, strict=True):
        assert rows(ours) == rows(theirs)
    asked = [batch for _, batches in read(config, masked=True) for batch in batches]
    assert sum(int((batch.tokens >= first).sum()) for batch in asked) > 20
    assert objective(config) == {"objective": "causal"}
    assert objective(config, masked=True) == {"objective": "causal_masked"}
    assert objective(off) == {}


@pytest.fixture(scope="module")
def with_units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("masked-units")
    for split in ("train", "held_out"):
        test_units.write(home / split, documents=30)
        for name, layout in test_units.LAYOUTS.items():
            shards = sorted((home / split / name).glob("*.tar"))
            test_units.index_shards(shards, layout=layout, tokenizer=corpora.tokenizer_path())
    return home


def test_codes_stay_whole_and_other_units_may_be_split(with_units: Path) -> None:
    config = replace(test_units.configured(with_units), masking=MASKING, repeat=True)
    config.sources["painted"].text_first_fraction = 0.5
    corpus = test_units.opened(config)
    ids = corpus.tokenizer.ids
    image, first = ids.units[Modality.image], masks(ids).first
    reader, masked_images, split_speech = Reader(corpus, seed=config.seed), 0, 0
    for row, _ in islice(plan_rows(corpus, config), 80):
        batch = build([row], reader=reader, row_tokens=config.row_tokens, blocks=Blocks())
        assert int((batch.modality > 0).sum()) == sum(piece.tokens for piece in row)
        tokens = batch.tokens[0]
        begins, ends = (tokens == image.begin).nonzero(), (tokens == image.end).nonzero()
        assert ((ends - begins) == 10).all()
        before = tokens[begins.flatten() - 1]
        masked_images += int((before >= first).sum())
        is_sentinel = tokens[1:] >= first
        split_speech += int((is_sentinel & (batch.modality[0, :-1] == Modality.speech)).sum())
    assert masked_images > 10
    assert split_speech > 10


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mean_spans": -1.0}, r"data\.masking\.mean_spans is -1\.0; set it to 0 or more"),
        ({"sentinels": 0}, r"data\.masking\.sentinels is 0; set it above 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MaskingConfig(**changes)


def test_an_image_that_leaves_no_room_is_refused() -> None:
    config = configured(context_tokens=22, row_tokens=44)
    with pytest.raises(UserError, match=r"an image of 16 tokens and data\.masking\.mean_spans is"):
        corpora.open_corpus(config)
    assert corpora.open_corpus(replace(config, masking=MaskingConfig())).sources[0].kind is (
        Kind.caption
    )
