"""Units of any modality: read safely, laid out with their labels, cut or not, trained on."""

import json
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from data.corpus import Corpus
from data.loader import Loader
from data.pack import cut
from data.prepare.index import index_shards
from data.prepare.validate import validate
from data.sequences import segments, sequence
from data.shards import ShardWriter
from data.tokenizer import Tokenizer
from data.units import LARGEST, NotUnitsError, Units, read_units
from nmm.batch import NO_LABEL, Modality
from nmm.config import DataConfig, Kind, Layout, SourceConfig, UnitModality
from nmm.errors import UserError
from nmm.log import read_rows
from tests import corpora, runs

SPEECH, CODES = 40, 16
SPOKEN = Layout(Kind.units, modality=UnitModality.speech)
PAINTED = Layout(Kind.caption, modality=UnitModality.image)


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["u1", "<i2", ">i4", "<u8", "i8"])
def test_integers_of_any_type_are_units(kind: str) -> None:
    values = np.array([0, 7, 3, 120], kind)
    assert read_units(npy(values)).values.tolist() == [0, 7, 3, 120]
    assert read_units(npy(values)).values.dtype == np.int64


HUGE = npy(np.zeros(3, np.int32)).replace(b"(3,), }" + b" " * 13, b"(3000000000000,), }" + b" ")
NOT_UNITS = {
    "empty": b"",
    "text": b"3 1 4 1 5",
    "only a header": npy(np.arange(9))[:128],
    "cut": npy(np.arange(9))[:-1],
    "longer": npy(np.arange(9)) + b"\0",
    "none": npy(np.zeros(0, np.int64)),
    "two axes": npy(np.zeros((2, 3), np.int64)),
    "no axis": npy(np.array(3)),
    "fractions": npy(np.zeros(3)),
    "truth": npy(np.zeros(3, bool)),
    "records": npy(np.zeros(3, [("a", int)])),
    "pickled": npy(np.array([{"a": 1}, None], object), allow_pickle=True),
    "negative": npy(np.array([1, -1])),
    "too large": npy(np.array([LARGEST + 1])),
    "a claim of terabytes": HUGE,
    "a header of brackets": npy(np.arange(3)).replace(b"{'descr'", b"[[[[[[[["),
}


@pytest.mark.parametrize("name", NOT_UNITS)
def test_what_is_no_row_of_whole_numbers_is_refused(name: str) -> None:
    with pytest.raises(NotUnitsError):
        read_units(NOT_UNITS[name])


def tokenizer() -> Tokenizer:
    units = {UnitModality.speech: SPEECH, UnitModality.image: CODES}
    return Tokenizer(corpora.tokenizer_path(), units=units)


def test_the_ids_of_units_follow_those_of_text() -> None:
    plain, ids = Tokenizer(corpora.tokenizer_path()).ids, tokenizer().ids
    assert replace(ids, units={}, size=plain.size) == plain
    speech, image = ids.units[Modality.speech], ids.units[Modality.image]
    assert (speech.begin, speech.end, speech.first) == (plain.size, plain.size + 1, plain.size + 2)
    assert (image.begin, image.first) == (speech.first + SPEECH, speech.first + SPEECH + 2)
    assert ids.size == image.first + CODES
    with pytest.raises(UserError, match=rf"needs {ids.size} ids with data\.units"):
        tokenizer().check_capacity(ids.size - 1)


def test_the_drawn_sequence() -> None:
    """["x", units 3 7] becomes b x < 3 7 > e, and everything behind b is predicted."""
    ids = tokenizer().ids
    speech = ids.units[Modality.speech]
    texts = [[9], Units(np.array([3, 7]))]
    found = sequence(texts, ids, image_tokens=5, modality=Modality.speech)
    run = [speech.begin, speech.first + 3, speech.first + 7, speech.end]
    assert found.tokens.tolist() == [ids.bos, 9, *run, ids.eos]
    assert found.labels.tolist() == [9, *run, ids.eos, NO_LABEL]
    text, heard = Modality.text, Modality.speech
    assert found.modality.tolist() == [text, text, text, heard, heard, text, text]
    assert found.label_modality.tolist() == [text, text, heard, heard, text, text, 0]
    assert not found.image.any()
    assert segments(texts).tolist() == [1, -4]


@pytest.mark.parametrize(
    ("whole", "expected"),
    # begin, 2 of text, a run of 8 positions, 3 of text, end: 15 tokens in a context of 9
    [(False, [(0, 9), (9, 15)]), (True, [(0, 3), (3, 11), (11, 15)])],
)
def test_images_are_whole_and_other_units_are_cut(
    whole: bool, expected: list[tuple[int, int]]
) -> None:
    found = cut(
        np.array([15]),
        segment=np.array([2, -8, 3]),
        border=np.array([0, 3]),
        image_tokens=100,
        context_tokens=9,
        whole_units=whole,
    )
    assert list(zip(found.start.tolist(), found.stop.tolist(), strict=True)) == expected


def write(directory: Path, *, documents: int = 60) -> None:
    """Speech of 5 to 200 units, captions of images of 9 codes, and text; the last few are bad."""
    rng = np.random.default_rng(len(directory.name))
    with ShardWriter(directory / "speech", name="a", documents_per_shard=40) as writer:
        for number in range(documents):
            start, length = rng.integers(0, SPEECH), rng.integers(5, 200)
            writer.units(f"{number:04d}", (start + np.arange(length)) % SPEECH)
        writer._write("bad", {"units.npy": npy(np.zeros((2, 2), int))})
        writer._write("worse", {"units.npy": npy(np.array([None]), allow_pickle=True)})
    with ShardWriter(directory / "painted", name="a", documents_per_shard=40) as writer:
        for number in range(documents):
            codes = np.full(9, rng.integers(0, CODES))
            writer.units(f"{number:04d}", codes, text=f"{corpora.WORDS[codes[0]]} gate")
        writer._write("mute", {"units.npy": npy(np.arange(9))})
    corpora.write_shards(
        directory / "text", kind=Kind.text, name="a", documents=documents, per_shard=40, seed=3
    )


LAYOUTS = {"speech": SPOKEN, "painted": PAINTED, "text": Layout(Kind.text)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and held_out/ of three sources, indexed."""
    home = tmp_path_factory.mktemp("units")
    for split in ("train", "held_out"):
        write(home / split)
        for name, layout in LAYOUTS.items():
            shards = sorted((home / split / name).glob("*.tar"))
            index_shards(shards, layout=layout, tokenizer=corpora.tokenizer_path())
    return home


def configured(directory: Path, **changes: object) -> DataConfig:
    sources = {
        name: SourceConfig(
            layout.kind,
            f"{directory}/train/{name}/*.tar",
            f"{directory}/held_out/{name}/*.tar",
            1.0,
            modality=layout.modality,
        )
        for name, layout in LAYOUTS.items()
    }
    units = {UnitModality.speech: SPEECH, UnitModality.image: CODES}
    return corpora.config(**{"sources": sources, "units": units, "repeat": False, **changes})


def opened(config: DataConfig, *, vocab_size: int = corpora.VOCAB_SIZE) -> Corpus:
    return Corpus.open(config, image=corpora.IMAGE, vocab_size=vocab_size, split="train")


def test_bad_units_are_counted_and_named(directory: Path) -> None:
    shards = sorted((directory / "train" / "speech").glob("*.tar"))
    indexed = index_shards(shards, layout=SPOKEN, tokenizer=corpora.tokenizer_path())
    assert (indexed.documents, indexed.dropped) == (60, {"bad_units": 2})
    assert indexed.examples == {"bad_units": "bad"}
    report = validate(shards, layout=SPOKEN)
    assert report.defects == Counter(bad_units=2)
    assert report.notes == {}
    painted = sorted((directory / "train" / "painted").glob("*.tar"))
    report = validate(painted, layout=PAINTED)
    assert report.defects == Counter(missing_text=1)


def test_every_unit_is_laid_out_once_with_its_label(directory: Path) -> None:
    """What the shards hold is what an epoch of rows holds; images of codes are never cut."""
    config = replace(configured(directory), sources={}, global_rows=1)
    sources = configured(directory).sources
    speech = Tokenizer(corpora.tokenizer_path(), units=config.units).ids.units[Modality.speech]
    config = replace(config, sources={"speech": sources["speech"]})
    corpus = opened(config)
    units = labels = cuts = 0
    loader = iter(Loader(corpus, config, rank=0, world=1, micro_batch=1, workers=0))
    for _ in range(int(corpus.supply_tokens() // config.row_tokens)):
        (batch,), _ = next(loader)
        is_unit = batch.modality == Modality.speech
        assert (batch.tokens[is_unit] >= speech.first).all()
        assert (batch.tokens[is_unit] < speech.first + SPEECH).all()
        assert torch.equal(batch.label_modality > 0, batch.labels != NO_LABEL)
        named = batch.labels[batch.label_modality == Modality.speech]
        assert ((named >= speech.first) & (named < speech.first + SPEECH)).all()
        units, labels = units + int(is_unit.sum()), labels + len(named)
        cuts += int((batch.labels[:, -1] != NO_LABEL).sum())
    total = corpus.sources[0].unit_tokens - 2 * corpus.sources[0].documents
    assert total - 2 * config.row_tokens < units <= total
    assert abs(labels - units) < config.row_tokens
    assert corpus.sources[0].text_tokens == corpus.sources[0].images == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"units": {UnitModality.image: CODES}}, r"speech\.modality is speech, but data\.units"),
        (
            {"units": {UnitModality.speech: 39, UnitModality.image: CODES}},
            r"the speech unit 39.*40",
        ),
        ({"context_tokens": 8}, r"an image of 11 tokens, which are never cut.* set it to 13"),
    ],
)
def test_units_that_do_not_fit_are_refused(change: dict, sentence: str, directory: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        opened(configured(directory, **change))


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (Layout(Kind.units), r"modality is null, but the kind is units; say .* image, speech"),
        (Layout(Kind.text, modality=UnitModality.code), "modality is code, but the kind is text"),
        (Layout(Kind.units, "text", UnitModality.code), "field is text, but the kind is units"),
    ],
)
def test_layouts_that_contradict_themselves_are_refused(layout: Layout, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        layout.check("field", modality_key="modality")


def test_a_run_learns_every_modality(directory: Path, tmp_path: Path) -> None:
    """One loss per modality, all of them falling, and tokens that add up."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    sources = {
        name: {
            "kind": layout.kind.value,
            "train": f"{directory}/train/{name}/*.tar",
            "held_out": f"{directory}/held_out/{name}/*.tar",
            "weight": 1.0,
            "modality": layout.modality and layout.modality.value,
        }
        for name, layout in LAYOUTS.items()
    }
    data = {"sources": sources, "units": {"speech": SPEECH, "image": CODES}}
    (tmp_path / "conf" / "data" / "units.yaml").write_text(json.dumps(data))
    pixels = (f"{key}={value}" for key, value in runs.DEFAULT_PIXELS.items())
    more = ("schedule.total_steps=60", "model.image.kind=codes", *pixels)
    arguments = runs.command(runs.corpus(), tmp_path, *runs.WHOLE, *more)
    kept = [word for word in arguments if not word.startswith("data.sources.")]
    done = runs.run([*kept, "data=units", "--config-dir", str(tmp_path / "conf")])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "whole" / "losses.jsonl")
    for name in ("text", "speech", "image"):
        key = f"loss/modality/{name}"
        assert rows[-1][key] < 0.8 * rows[0][key]
    last = rows[-1]
    counted = sum(last[f"tokens/modality/{name}"] for name in ("text", "speech", "image"))
    assert counted == last["tokens"]
    row = json.loads((tmp_path / "whole" / "evals.jsonl").read_text().splitlines()[-1])
    assert row["loss/modality/speech"] > 0
    assert row["loss/kind/units"] > 0
