"""Generation: greedy text is the argmax of full forwards in any batch; only text ids come out."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.documents import Parts
from data.tokenizer import Tokenizer
from nmm.batch import PackedBatch
from nmm.config import ModelConfig
from nmm.generate import generate, main
from nmm.model import Model, build
from tests import corpora, runs

MODEL = ModelConfig(width=32, depth=2, heads=2, vocab_size=corpora.VOCAB_SIZE, image=corpora.IMAGE)


@pytest.fixture(scope="module")
def model() -> Model:
    return build(MODEL, seed=3).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path())


def prompts() -> list[Parts]:
    rng = np.random.default_rng(0)
    return [
        [corpora.jpeg(rng)],
        [corpora.jpeg(rng), "the small red", corpora.jpeg(rng), "circle"],
        ["two green squares"],
    ]


def test_a_batch_of_prompts_equals_each_prompt_alone(model: Model, tokenizer: Tokenizer) -> None:
    together = generate(model, prompts(), tokenizer=tokenizer, max_tokens=8)
    alone = [generate(model, [p], tokenizer=tokenizer, max_tokens=8)[0] for p in prompts()]
    assert together == alone
    assert len(set(together)) == 3  # the prompts matter


def test_greedy_text_is_the_argmax_of_a_full_forward(model: Model, tokenizer: Tokenizer) -> None:
    written = generate(model, [["two green"]], tokenizer=tokenizer, max_tokens=6)[0]
    ids = [tokenizer.ids.bos, *tokenizer.encode("two green")]
    prompt = len(ids)
    allowed = torch.arange(corpora.VOCAB_SIZE) < tokenizer.ids.text_end
    allowed[[tokenizer.ids.pad, tokenizer.ids.unk, tokenizer.ids.bos]] = False
    while len(ids) < prompt + 6 and ids[-1] != tokenizer.ids.eos:
        shape = (1, len(ids))
        ones, zeros = torch.ones(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
        batch = PackedBatch(
            tokens=torch.tensor([ids]),
            modality=ones.to(torch.uint8),
            source=zeros.to(torch.uint8),
            document=ones,
            image=zeros,
            position=torch.arange(len(ids), dtype=torch.int32)[None],
            labels=torch.full(shape, -100),
            label_modality=zeros.to(torch.uint8),
            pixels=torch.zeros((0, 16, 16, 3), dtype=torch.uint8),
        )
        logits = model.logits(batch)[0, -1].masked_fill(~allowed, -torch.inf)
        ids.append(int(logits.argmax()))
    assert written == tokenizer.decode(ids[prompt:])


def test_padding_ids_are_never_written(tokenizer: Tokenizer) -> None:
    """A model whose head prefers the ids beyond the tokenizer's by far."""
    model = build(MODEL, seed=0)
    with torch.no_grad():
        model.head.weight[tokenizer.ids.text_end :] *= 1000
    written = generate(
        model, prompts(), tokenizer=tokenizer, max_tokens=12, temperature=1.0, seed=1
    )
    again = generate(model, prompts(), tokenizer=tokenizer, max_tokens=12, temperature=1.0, seed=1)
    assert written == again
    assert all(tokenizer.encode(text) or text == "" for text in written)
    assert any(written)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    main()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--run", "NONE", "--prompt", "a"],
            r"none/config.yaml does not exist; give the directory",
        ),
        (["--run", "UNTRAINED", "--prompt", "a"], r"untrained has no complete checkpoint; train"),
        (["--run", "WHOLE"], r"nothing to continue; give --image, --prompt or --held-out"),
        (["--run", "WHOLE", "--held-out", "0"], r"--held-out is 0; give 1 or more"),
        (["--run", "WHOLE", "--held-out", "2", "--prompt", "a"], r"--held-out is 2; .*without"),
        (["--run", "WHOLE", "--image", "NONE"], r"--image \S+none cannot be read \(No such file"),
        (["--run", "WHOLE", "--image", "FOLDER"], r"--image \S+ cannot be read \(Is a directory"),
        (["--run", "WHOLE", "--image", "PAGE"], r"--image \S+page.jpg cannot be decoded \(\w+\)"),
        (["--run", "WHOLE", "--image", "CUT"], r"--image \S+cut.jpg cannot be decoded \(\w+\)"),
        (["--run", "WHOLE", "--prompt", "a", "--max-tokens", "0"], r"--max-tokens is 0"),
        (["--run", "WHOLE", "--prompt", "a", "--temperature", "-1"], r"--temperature is -1.0"),
        (["--run", "WHOLE", "--prompt", "a", "--temperature", "nan"], r"--temperature is nan"),
        (["--run", "WHOLE", "--prompt", "a", "--seed", "-1"], r"--seed is -1"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "untrained").mkdir()
    shutil.copy(runs.undisturbed() / "config.yaml", tmp_path / "untrained")
    (tmp_path / "page.jpg").write_text("<html>")
    picture = corpora.jpeg(np.random.default_rng(0), width=256, height=256)
    (tmp_path / "cut.jpg").write_bytes(picture[: len(picture) - 300])
    places = {
        "NONE": tmp_path / "none",
        "UNTRAINED": tmp_path / "untrained",
        "WHOLE": runs.undisturbed(),
        "FOLDER": tmp_path,
        "PAGE": tmp_path / "page.jpg",
        "CUT": tmp_path / "cut.jpg",
    }
    with pytest.raises(SystemExit, match=f"^error: .*{said}") as refusal:
        command(monkeypatch, *(places.get(word, word) for word in arguments))
    assert "\n" not in str(refusal.value)


def test_the_command_continues_the_prompt_and_captions_held_out_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "whole"
    shutil.copytree(runs.undisturbed(), run)
    (tmp_path / "cat.jpg").write_bytes(corpora.jpeg(np.random.default_rng(0)))
    for image in ((), ("--image", tmp_path / "cat.jpg")):
        command(monkeypatch, "--run", run, "--prompt", "two green", "--max-tokens", 6, *image)
        written = capsys.readouterr().out
        assert written.startswith("two green")
        assert len(written) > len("two green\n")
    command(monkeypatch, "--run", run, "--held-out", 3, "--max-tokens", 4)
    captions = [json.loads(line) for line in (run / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == len({caption["key"] for caption in captions}) == 3
    assert all(
        set(caption["reference"].strip(".").split()) <= {*corpora.WORDS} for caption in captions
    )
    assert (run / "captions.png").stat().st_size > 0
