"""Generation: greedy text is the argmax of full forwards in any batch; only text ids come out."""

import numpy as np
import pytest
import torch

from data.documents import Parts
from data.tokenizer import Tokenizer
from nmm.batch import PackedBatch
from nmm.config import ModelConfig
from nmm.generate import generate
from nmm.model import Model, build
from tests import corpora

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
