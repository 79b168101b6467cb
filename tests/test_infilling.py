"""Holes are filled in: laid out as spans of the training, by a model that learned them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from data import sequences
from data.documents import Parts
from data.masking import masked
from data.sequences import Sequence
from data.tokenizer import MaskIds, Tokenizer
from nmm import export
from nmm.batch import Modality, PackedBatch
from nmm.config import ImageConfig, ImageKind, MaskingConfig, ModelConfig, UnitModality
from nmm.errors import UserError
from nmm.generate import generate
from nmm.generate.__main__ import main
from nmm.generate.prompts import Hole, of_file, of_options
from nmm.generate.rules import with_images
from nmm.generate.text import HOLE_TOKENS, check_prompts, lay_out, prompt_tokens
from nmm.model import Model, build
from nmm.trained import Trained
from tests import corpora
from tests.test_export import untrained

MASKING = MaskingConfig(mean_spans=1.0, sentinels=4)
PARTNERS = {"red": "two", "small": "seven", "green": "circle", "the": "squares"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path(), units={UnitModality.image: 8}, sentinels=MASKING.ids)


def masks(tokenizer: Tokenizer) -> MaskIds:
    assert tokenizer.ids.masks is not None
    return tokenizer.ids.masks


def whole(parts: Parts, tokenizer: Tokenizer, *, image: ImageConfig) -> Sequence:
    texts = sequences.encode(parts, tokenizer)
    return sequences.sequence(
        texts, tokenizer.ids, image_tokens=image.tokens, modality=Modality.image
    )


def test_a_hole_is_laid_out_as_a_span_of_the_training(tokenizer: Tokenizer) -> None:
    """All but the span itself and its end, with images before and behind it."""
    rng = np.random.default_rng(0)
    one, two = corpora.jpeg(rng), corpora.jpeg(rng)
    image = corpora.IMAGE
    for before, span, after in (
        (["two", one, "red"], "small green", ["circle", two]),
        ([], "seven", ["squares"]),
        ([one], "seven squares", []),
    ):
        full = whole([*before, span, *after], tokenizer, image=image)
        first = prompt_tokens(before, tokenizer=tokenizer, image=image)
        size = len(tokenizer.encode(span))
        expected = masked(full, [(first, first + size)], ids=masks(tokenizer))
        laid = lay_out([before], after=[after], tokenizer=tokenizer, image=image)
        (length,) = laid.lengths.tolist()
        assert length == len(expected.tokens) - size - 1
        assert length == prompt_tokens(before, after=after, tokenizer=tokenizer, image=image)
        for name in ("tokens", "modality", "image"):
            found = getattr(laid.batch, name)[0].tolist()
            assert found == getattr(expected, name)[:length].tolist(), name


def batch_of(pieces: Iterable[Sequence]) -> PackedBatch:
    """Text alone, one piece a row."""
    pieces = list(pieces)
    length = max(len(piece.tokens) for piece in pieces)

    def rows(field: str, fill: int) -> torch.Tensor:
        found = [
            np.pad(getattr(p, field), (0, length - len(p.tokens)), constant_values=fill)
            for p in pieces
        ]
        return torch.from_numpy(np.stack(found))

    labels = rows("labels", -100)
    return PackedBatch(
        tokens=rows("tokens", 0),
        modality=rows("modality", 0),
        source=torch.zeros(labels.shape, dtype=torch.uint8),
        document=(rows("modality", 0) > 0).int(),
        image=torch.zeros(labels.shape, dtype=torch.int32),
        position=torch.arange(length, dtype=torch.int32).expand(labels.shape),
        labels=labels,
        label_modality=rows("label_modality", 0),
        pixels=torch.zeros(0, 16, 16, 3, dtype=torch.uint8),
    )


def learned(tokenizer: Tokenizer) -> Model:
    """Each of four words stands before its partner; the first word was moved to the end."""
    image = ImageConfig(ImageKind.none)
    pieces = []
    for word, partner in PARTNERS.items():
        full = whole([word, partner], tokenizer, image=image)
        span = (1, 1 + len(tokenizer.encode(word)))
        pieces.append(masked(full, [span], ids=masks(tokenizer)))
    batch = batch_of(pieces)
    size = {"width": 32, "depth": 2, "heads": 2, "vocab_size": corpora.VOCAB_SIZE}
    model = build(ModelConfig(**size, image=image), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).loss_sum.backward()
        optimizer.step()
    return model.eval()


def test_a_model_that_learned_spans_fills_holes_by_what_is_behind_them(
    tokenizer: Tokenizer,
) -> None:
    """Every word by its partner, in a batch; the document before the hole tells nothing."""
    model = learned(tokenizer)
    found = generate(
        model,
        [[] for _ in PARTNERS],
        after=[[partner] for partner in PARTNERS.values()],
        tokenizer=tokenizer,
        max_tokens=8,
    )
    assert [written.text for written in found] == [*PARTNERS]
    assert all(written.ended for written in found)


def test_a_span_has_text_whole_images_and_its_end(tokenizer: Tokenizer) -> None:
    """And neither the end of the document nor a sentinel, whatever the model prefers."""
    ids, image = tokenizer.ids, ImageConfig(ImageKind.codes)
    size = {"width": 32, "depth": 2, "heads": 2, "vocab_size": corpora.VOCAB_SIZE}
    model = build(ModelConfig(**size, image=image), seed=3).eval()
    end, room = masks(tokenizer).end, 12
    codes = ids.units[Modality.image]
    rule = with_images(ids, model=model, image_codes=4, max_tokens=room, end=end)
    texts = {*range(ids.text_end)} - {ids.pad, ids.unk, ids.bos, ids.eos}

    def allowed(*written: int) -> set[int]:
        may = rule(torch.tensor([written], dtype=torch.int64)).expand(1, -1)
        return set(may[0].nonzero().flatten().tolist())

    assert allowed() == allowed(7) == {*texts, end, codes.begin}
    assert allowed(codes.begin) == {*range(codes.first, codes.first + codes.count)}
    assert allowed(*[7] * 7) == {*texts, end}  # no room for a whole image


def test_what_does_not_fit_is_refused(tokenizer: Tokenizer) -> None:
    prompt, after = ["two red"], ["circle"]
    tokens = len(tokenizer.encode("two red")) + len(tokenizer.encode("circle")) + 1 + HOLE_TOKENS
    room = {"tokenizer": tokenizer, "model": ModelConfig(vocab_size=512), "max_tokens": 4}
    check_prompts([prompt], after=[after], context_tokens=tokens + 4, **room)
    with pytest.raises(UserError, match=f"prompt 1 has {tokens} tokens and --max-tokens is 4"):
        check_prompts([prompt], after=[after], context_tokens=tokens + 3, **room)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As if it had been trained with spans."""
    plain = untrained()
    plain.config.data.masking = MASKING
    tokenizer = Tokenizer(plain.config.data.tokenizer, sentinels=MASKING.ids)
    out = tmp_path_factory.mktemp("infilling") / "out"
    export.write_export(Trained(**{**vars(plain), "tokenizer": tokenizer}), out)
    return out


def test_the_command_writes_into_the_hole(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written stands between what is before and behind it; its lines are prompts again."""
    picture = tmp_path / "a.png"
    picture.write_bytes(corpora.jpeg(np.random.default_rng(0)))
    given = ["--prompt", "two", "--image", str(picture), "--hole", "--prompt", "red circle"]
    drawn = ["--temperature", "1", "--max-tokens", "6", "--out", str(tmp_path / "out")]
    main(["--export", str(exported), *given, *drawn])
    (row,) = map(json.loads, (tmp_path / "out" / "generated.jsonl").read_text().splitlines())
    said = capsys.readouterr().out
    (written,) = re.findall(r"(?s)^two\[a.png\](.*?)( ?)red circle\nwrote", said)
    assert len(written[0]) == len(row["written"]) > 0
    assert (row["texts"], row["after_texts"]) == (["two", None], ["red circle"])
    (again,) = of_file(tmp_path / "out" / "generated.jsonl")
    prompt = of_options(["two", picture, Hole.here, "red circle"])
    assert (again.parts, again.images, again.after) == (prompt.parts, prompt.images, prompt.after)
    page = (tmp_path / "out" / "generated.html").read_text()
    assert page.index("answer") < page.index("red circle")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--export", "PLAIN", "--prompt", "a", "--hole"], r"mean_spans was 0 in the training; le"),
        (["--export", "MASKED", "--hole", "--hole"], r"--hole was given 2 times, but one is fil"),
        (["--export", "MASKED", "--prompts", "MIXED"], r"lines with a hole .* and lines without"),
        (["--export", "MASKED", "--prompts", "HALF"], r"line 1: is no document \(bad_layout\)"),
        (["--export", "MASKED", "--hole", "--held-out", "2"], r"three ways to say what"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(
    exported: Path, tmp_path: Path, arguments: list[str], error: str
) -> None:
    line = {"texts": ["a"], "images": [None]}
    hole = {**line, "after_texts": ["b"], "after_images": [None]}
    for name, lines in (("mixed", [line, hole]), ("half", [{**line, "after_texts": ["b"]}])):
        text = "".join(json.dumps(one) + "\n" for one in lines)
        (tmp_path / name).write_text(text)
    if "PLAIN" in arguments:
        export.write_export(untrained(), tmp_path / "plain")
    places = {"PLAIN": tmp_path / "plain", "MASKED": exported}
    places |= {"MIXED": tmp_path / "mixed", "HALF": tmp_path / "half"}
    with pytest.raises(SystemExit, match=error) as refusal:
        main([str(places.get(argument, argument)) for argument in arguments])
    assert "\n" not in str(refusal.value)
