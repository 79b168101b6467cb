"""The demo corpus: same seed, same bytes; splits that share nothing; captions that are true."""

import ast
import inspect
import io
import json
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from data.prepare import demo, prose
from data.prepare.scenes import COLOURS, SIDE, Scene, words_named_in, words_true_of
from data.prepare.stories import NUMBERS, story
from data.units import read_units
from nmm.errors import UserError
from tests import corpora

SIZE = 0.02  # 200 captions, 60 stories, 20,000 characters


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "demo"
    demo.render(out, size=SIZE, seed=0)
    return out


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("*/*"))}


def samples(out: Path, kind: str, split: str) -> list[dict[str, bytes]]:
    """The samples of a split: extension -> bytes."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted((out / kind).glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                stream = tar.extractfile(member)
                assert stream is not None
                found.setdefault(key, {})[extension] = stream.read()
    return list(found.values())


def scene_keys(out: Path, split: str) -> set[str]:
    """What the pictures of a split show, without places and sizes."""
    scenes = (json.loads(sample["json"]) for sample in samples(out, "caption", split))
    return {json.dumps([scene["groups"], scene["axis"], scene["background"]]) for scene in scenes}


def words_of(scene: Scene) -> set[str]:
    return {word for group in scene.groups for word in (group.colour, group.shape)}


def test_same_seed_same_bytes_and_another_seed_other_bytes(corpus: Path, tmp_path: Path) -> None:
    demo.render(tmp_path / "again", size=SIZE, seed=0)
    demo.render(tmp_path / "other", size=SIZE, seed=1)
    first, again, other = (
        shard_bytes(out) for out in (corpus, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_size_decides_how_much(corpus: Path) -> None:
    counted = {
        (kind, split): len(samples(corpus, kind, split))
        for kind in ("caption", "interleaved")
        for split in ("train", "held_out")
    }
    assert counted == {
        ("caption", "train"): 200,
        ("caption", "held_out"): 8,
        ("interleaved", "train"): 60,
        ("interleaved", "held_out"): 8,
    }
    texts = [sample["txt"].decode() for sample in samples(corpus, "text", "train")]
    assert 20_000 <= sum(map(len, texts)) < 20_000 + len(texts[0]) + max(map(len, texts))
    for kind in ("caption", "interleaved", "text"):
        assert len(list((corpus / kind).glob("train-*.tar"))) >= 2


def test_held_out_scenes_and_texts_never_occur_in_train(corpus: Path) -> None:
    assert scene_keys(corpus, "train").isdisjoint(scene_keys(corpus, "held_out"))
    train, held_out = (
        {sample["txt"] for sample in samples(corpus, "text", split)} for split in demo.SPLITS
    )
    assert held_out
    assert train.isdisjoint(held_out)


def test_captions_name_what_the_picture_shows_and_nothing_else(corpus: Path) -> None:
    for sample in samples(corpus, "caption", "train"):
        caption, scene = sample["txt"].decode(), json.loads(sample["json"])
        assert words_named_in(caption) == words_true_of(scene)
        assert 8 <= len(caption.split()) <= 18
        assert scene["background"] in caption
        assert len(scene["objects"]) == sum(group["count"] for group in scene["groups"])


def test_pictures_hold_the_objects_in_their_colours(corpus: Path) -> None:
    for sample in samples(corpus, "caption", "held_out"):
        picture = Image.open(io.BytesIO(sample["jpg"]))
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (SIDE, SIDE))
        for thing in json.loads(sample["json"])["objects"]:
            left, top, size = thing["left"], thing["top"], thing["size"]
            assert min(left, top) >= 0
            assert max(left, top) + size <= SIDE
            pixels = picture.crop((left, top, left + size, top + size)).tobytes()
            colour = COLOURS[thing["colour"]]
            errors = (
                max(abs(have - want) for have, want in zip(pixels[i : i + 3], colour, strict=True))
                for i in range(0, len(pixels), 3)
            )
            assert sum(error < 40 for error in errors) > 0.2 * size**2


def test_words_of_a_caption_fold_plurals_and_ignore_other_words() -> None:
    assert words_named_in("Two RED rings and a cross, reddish starlight.") == {
        "red",
        "ring",
        "cross",
    }
    assert words_named_in("On a dark background.") == set()


@pytest.mark.parametrize("held_out", [False, True])
def test_stories_stay_in_their_split_and_tell_every_change(held_out: bool) -> None:
    rng = Random(3)
    for _ in range(60):
        parts, scenes = story(rng, held_out=held_out)
        title, *rest = parts
        assert title == f"A story in {NUMBERS[len(scenes)]} pictures."
        assert [type(part) for part in rest] == [bytes, str] * len(scenes)
        assert {scene.held_out for scene in scenes} == {held_out}
        sentences = [part for part in rest if isinstance(part, str)]
        assert words_named_in(sentences[0]) == words_of(scenes[0])
        for i in range(1, len(scenes)):
            before, after = scenes[i - 1], scenes[i]
            assert after != before
            assert words_of(after) <= words_named_in(sentences[i])
            told_background = after.background in sentences[i].split()
            assert told_background == (after.background != before.background)


def test_interleaved_samples_keep_reading_order(corpus: Path) -> None:
    for sample in samples(corpus, "interleaved", "train"):
        described = json.loads(sample["json"])
        texts, images = described["texts"], described["images"]
        assert [text is None for text in texts] == [image is not None for image in images]
        members = [image for image in images if image is not None]
        assert members == [f"{i}.jpg" for i in range(len(members))]
        assert set(sample) == {"json", *members}
        assert 2 <= len(members) <= 4


def test_prose_is_clean_unique_and_from_several_packages() -> None:
    texts = list(islice(prose.texts(seed=0), 600))
    assert len(set(texts)) == len(texts)
    assert all(len(text) >= prose.MINIMUM_CHARACTERS for text in texts)
    assert all(inspect.cleandoc(text) == text for text in texts)
    assert texts == list(islice(prose.texts(seed=0), 600))
    together = "\n".join(texts)
    assert all(word in together for word in ("torch", "sympy", "matplotlib", "numpy"))


def test_code_is_functions_without_their_documentation_in_one_split_each(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Units are bytes of UTF-8 that Python reads; prose and code share no documentation string."""
    out = corpus.parent / "with_code"
    shutil.copytree(corpus, out)
    shutil.copy(corpora.tokenizer_path(), out / "tokenizer.model")
    demo.render_code(out, size=SIZE, seed=0)
    splits = {}
    for split in ("train", "held_out"):
        values = [read_units(s["units.npy"]).values for s in samples(out, "code", split)]
        splits[split] = {bytes(value.astype("uint8")).decode() for value in values}
        assert len(values) == len(splits[split]) >= demo.FEWEST
    assert not splits["train"] & splits["held_out"]
    for code in splits["train"] | splits["held_out"]:
        (function,) = ast.parse(code).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
    total = sum(len(code.encode()) for code in splits["train"])
    assert 20_000 <= total < 20_000 + max(len(code.encode()) for code in splits["train"])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    demo.render_code(out, size=SIZE, seed=0)
    assert "left alone" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_finished_corpus_is_left_alone(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    demo.render(corpus, size=SIZE, seed=0)
    assert "left alone" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    with pytest.raises(UserError, match=r'"seed": 0.*"seed": 1.*another --out'):
        demo.render(corpus, size=SIZE, seed=1)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_an_unfinished_corpus_is_made_anew(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "train-000007.tar").write_bytes(b"left over")
    (tmp_path / "caption" / "train-000008.tar.part").write_bytes(b"cut off")
    (tmp_path / "UNFINISHED").write_text("")
    demo.render(tmp_path, size=SIZE, seed=0)
    assert shard_bytes(tmp_path) == shard_bytes(corpus)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"COMPLETE"}


def test_a_folder_of_someone_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="new or an empty folder"):
        demo.render(tmp_path, size=SIZE, seed=0)
    assert shard_bytes(tmp_path) == {"caption/train-000000.tar": b"precious"}


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_command_line_refuses_a_size_in_one_sentence(size: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: --size is .*; set it above 0"):
        demo.main(["--out", str(tmp_path / "new"), "--size", size])
    assert not (tmp_path / "new").exists()
