"""Generation: the cache changes nothing, nor do neighbours; only allowed ids come out."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.documents import Parts
from data.tokenizer import Tokenizer
from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.config import (
    AttentionBackend,
    ExpertGroups,
    ImageAttention,
    ImageKind,
    MoDConfig,
    ModelConfig,
    MoEConfig,
    NormPosition,
    Positions,
    QKNorm,
    Routing,
    VisionConfig,
)
from nmm.errors import UserError
from nmm.generate import Sampling, continue_prompts, generate
from nmm.generate.rules import only_text
from nmm.generate.sampling import choose, most_probable, uniforms
from nmm.generate.text import check_prompts, lay_out
from nmm.model import Cache, Model, build
from nmm.model.cache import ROOM_COLUMNS
from nmm.routing import KEPT
from tests import corpora

STEPS = 8
GROUPS = ExpertGroups(text=3, image=2)


def built(**options: Any) -> Model:
    """Attention that is far from uniform, so that a wrong key shows."""
    sizes = {"width": 32, "depth": 2, "heads": 2, "vocab_size": corpora.VOCAB_SIZE}
    config = ModelConfig(**{**sizes, "image": corpora.IMAGE, **options})
    model = build(config, seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.mul_(2)
            if ".auxiliary." in name:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return built()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path())


def prompts() -> list[Parts]:
    """Images first, inside, last, beside each other and none; one that is empty."""
    rng = np.random.default_rng(0)
    one, two, three = (corpora.jpeg(rng) for _ in range(3))
    return [
        [one],
        [one, "the small red", two, "circle"],
        ["two green squares"],
        ["seven", three, two],
        [],
    ]


def document_of(ids: list[int], parts: Parts, *, model: Model, tokenizer: Tokenizer) -> PackedBatch:
    """A prompt and the ids after it, alone in a row."""
    prompt = lay_out([parts], tokenizer=tokenizer, image=model.config.image).batch
    length = prompt.tokens.shape[1] + len(ids)

    def longer(field: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(field, (0, len(ids)), value=value)

    return PackedBatch(
        tokens=torch.cat([prompt.tokens, torch.tensor([ids], dtype=torch.int64)], dim=1),
        modality=longer(prompt.modality, Modality.text),
        source=longer(prompt.source, 0),
        document=longer(prompt.document, 1),
        image=longer(prompt.image, 0),
        position=torch.arange(length, dtype=torch.int32)[None],
        labels=longer(prompt.labels, NO_LABEL),
        label_modality=longer(prompt.label_modality, 0),
        pixels=prompt.pixels,
    )


def whole(ids: list[int], parts: Parts, *, model: Model, tokenizer: Tokenizer) -> Tensor:
    """[V]: the logits after a prompt and ids, from one forward without a cache or neighbours."""
    batch = document_of(ids, parts, model=model, tokenizer=tokenizer)
    with torch.no_grad():
        return model.logits(batch, causal=model.config.auxiliary_routers)[0, -1]


MODELS: dict[str, dict[str, Any]] = {
    "by documents": {"attention": AttentionBackend.documents},
    "by mask": {"attention": AttentionBackend.mask},
    "learned positions": {"positions": Positions.learned, "max_positions": 60},
    "late fusion": {
        "image": replace(corpora.IMAGE, kind=ImageKind.encoder),
        "vision": VisionConfig(width=16, depth=1, heads=2),
    },
    "shared keys": {"heads": 4, "kv_heads": 2},
    "swin": {"norm_position": NormPosition.swin, "qk_norm": QKNorm.head},
    "only the first image": {"image_attention": ImageAttention.prefix},
    "auxiliary routers": {
        "moe": MoEConfig(
            Routing.expert_choice,
            groups=GROUPS,
            auxiliary_routers=True,
            group_rows=2,
        )
    },
    "depth": {"mod": MoDConfig(every=1, auxiliary_router=True), "depth": 3},
    "depth with experts": {
        "norm_position": NormPosition.swin,
        "depth": 3,
        "mod": MoDConfig(every=2, group_rows=2, auxiliary_router=True),
        "moe": MoEConfig(
            Routing.expert_choice, groups=GROUPS, auxiliary_routers=True, group_rows=2
        ),
    },
    "depth with token choice": {
        "mod": MoDConfig(every=2, auxiliary_router=True),
        "moe": MoEConfig(Routing.token_choice, experts=4, top_k=2),
        "positions": Positions.learned,
        "max_positions": 60,
    },
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_cache_changes_no_logits(options: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Prompts of many lengths together, against whole forwards of each; ids drawn at random."""
    model = built(**options)
    laid = lay_out(prompts(), tokenizer=tokenizer, image=model.config.image)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, tokenizer.ids.text_end, (len(prompts()), STEPS), generator=draw)
    cache = Cache(depth=model.config.depth, columns=laid.batch.tokens.shape[1] + STEPS)
    at = laid.lengths - 1
    with torch.no_grad():
        found = [model.first_logits(laid.batch, at=at, cache=cache)]
        for step in range(STEPS):
            found.append(model.next_logits(ids[:, step], at=at + 1 + step, cache=cache))
    for step, logits in enumerate(found):
        for row, parts in enumerate(prompts()):
            alone = whole(ids[row, :step].tolist(), parts, model=model, tokenizer=tokenizer)
            torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-5)
    check_what_is_remembered(cache, ids[:, :STEPS], model=model, tokenizer=tokenizer)


def check_what_is_remembered(
    cache: Cache, ids: Tensor, *, model: Model, tokenizer: Tokenizer
) -> None:
    """Layers that take some tokens have these, as many as one forward takes, and no others."""
    picks = [layer for layer in range(model.config.depth) if model.config.mod.picks(layer)]
    found = [cache.layers[layer].lengths.tolist() for layer in picks]
    expected = []
    for row, parts in enumerate(prompts() if picks else []):
        batch = document_of(ids[row].tolist(), parts, model=model, tokenizer=tokenizer)
        with torch.no_grad():
            expected.append(model(batch, causal=True).kept.sum(dim=1)[:, KEPT].int().tolist())
    assert found == [list(of_layer) for of_layer in zip(*expected, strict=True)]
    for layer, lengths in zip(picks, found, strict=True):
        assert STEPS < max(lengths) < 0.8 * cache.columns
        assert cache.layers[layer].keys.shape[1] < max(lengths) + ROOM_COLUMNS
        assert len(set(lengths)) > 2


def test_greedy_ids_are_those_without_a_cache(model: Model, tokenizer: Tokenizer) -> None:
    end = tokenizer.ids.eos
    rule = only_text(tokenizer.ids, model=model, end=end)
    found = continue_prompts(
        model,
        lay_out(prompts(), tokenizer=tokenizer, image=model.config.image),
        rule=rule,
        end=end,
        max_tokens=STEPS,
        sampling=Sampling(),
        streams=range(5),
    )
    for parts, ids in zip(prompts(), found, strict=True):
        expected: list[int] = []
        while len(expected) < STEPS and end not in expected:
            logits = whole(expected, parts, model=model, tokenizer=tokenizer)
            expected.append(int(logits.masked_fill(~rule(torch.empty(1, 0)), -torch.inf).argmax()))
        assert ids == expected
    assert len({tuple(ids) for ids in found}) == 5  # the prompts matter


def test_written_text_goes_on_where_the_prompt_ends(model: Model, tokenizer: Tokenizer) -> None:
    """What is read together is the prompt, then what is written: with the space between them."""
    asked: list[Parts] = [["two green"]] * 200
    drawn = Sampling(1.0)
    written = generate(
        model, asked, tokenizer=tokenizer, max_tokens=STEPS, sampling=drawn, at_once=200
    )
    rows = continue_prompts(
        model,
        lay_out(asked, tokenizer=tokenizer, image=model.config.image),
        rule=only_text(tokenizer.ids, model=model, end=tokenizer.ids.eos),
        end=tokenizer.ids.eos,
        max_tokens=STEPS,
        sampling=drawn,
        streams=range(200),
    )
    prompt = tokenizer.encode("two green")
    assert [f"two green{w.text}" for w in written] == [tokenizer.decode(prompt + r) for r in rows]
    assert 0 < sum(w.text.startswith(" ") for w in written) < 200


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.9, top_p=0.8, seed=5)])
def test_what_is_beside_a_prompt_does_not_matter(
    model: Model, tokenizer: Tokenizer, sampling: Sampling
) -> None:
    """Six prompts at once, two at a time, one at a time; the last two are equal."""
    asked = [*prompts()[:5], prompts()[4]]
    several = [
        generate(
            model, asked, tokenizer=tokenizer, max_tokens=8, sampling=sampling, at_once=at_once
        )
        for at_once in (6, 2, 1)
    ]
    assert several[0] == several[1] == several[2]
    greedy = sampling.temperature == 0
    assert (several[0][4] == several[0][5]) == greedy  # equal prompts are drawn for apart
    other = Sampling(sampling.temperature, sampling.top_p, seed=99)
    assert greedy == (
        several[0] == generate(model, asked, tokenizer=tokenizer, max_tokens=8, sampling=other)
    )


def test_a_prompt_ends_with_its_end(tokenizer: Tokenizer) -> None:
    """A model that goes on, then the same with a head that wants the end at once."""
    model = built()
    found = generate(model, prompts(), tokenizer=tokenizer, max_tokens=STEPS)
    assert not all(written.ended for written in found)
    with torch.no_grad():
        begin = lay_out([[]], tokenizer=tokenizer, image=model.config.image).batch
        model.head.weight.zero_()
        model.head.weight[tokenizer.ids.eos] = model.hidden(begin)[0, 0]
    (written,) = generate(model, [[]], tokenizer=tokenizer, max_tokens=STEPS)
    assert (written.text, written.ended) == ("", True)


def test_only_text_ids_and_the_end_are_drawn(tokenizer: Tokenizer) -> None:
    """A model whose head prefers by far what must not be written: padding, begin, unused ids."""
    model, ids = built(), tokenizer.ids
    banned = [ids.pad, ids.unk, ids.bos, *range(ids.text_end, corpora.VOCAB_SIZE)]
    with torch.no_grad():
        model.head.weight[banned] *= 1000
    laid = lay_out(prompts() * 20, tokenizer=tokenizer, image=model.config.image)
    found = continue_prompts(
        model,
        laid,
        rule=only_text(ids, model=model, end=ids.eos),
        end=ids.eos,
        max_tokens=12,
        sampling=Sampling(5.0, seed=1),
        streams=range(100),
    )
    drawn = Counter(token for row in found for token in row)
    assert not set(banned) & set(drawn)
    assert len(drawn) > 200
    assert drawn[ids.eos] == sum(row[-1] == ids.eos for row in found) > 0


def test_a_rule_decides_by_what_was_written(model: Model, tokenizer: Tokenizer) -> None:
    """Even ids first, then two odd ones, then the end: as grammars of codes need it."""

    def rule(written: Tensor) -> Tensor:
        ids = torch.arange(corpora.VOCAB_SIZE)
        odd = (written % 2 == 1).sum(dim=1, keepdim=True)
        return torch.where(
            odd == 2, ids == 3, (ids % 2 == 1) & (ids > 3) if written.shape[1] > 4 else ids % 2 == 0
        )

    found = continue_prompts(
        model,
        lay_out(prompts(), tokenizer=tokenizer, image=model.config.image),
        rule=rule,
        end=3,
        max_tokens=20,
        sampling=Sampling(1.0),
        streams=range(5),
    )
    assert [[token % 2 for token in row] for row in found] == [[0] * 5 + [1, 1, 1]] * 5
    assert all(row[-1] == 3 for row in found)


def test_frequencies_are_the_probabilities() -> None:
    """10,000 evenly spaced numbers in place of uniform ones, so that counts are exact."""
    probabilities = torch.tensor([0.1, 0.4, 0.0, 0.25, 0.25])
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = probabilities.log().expand(len(uniform), -1)

    def counts(sampling: Sampling, *allowed: int) -> list[int]:
        may = torch.zeros(5, dtype=torch.bool)
        may[list(allowed)] = True
        found = choose(logits, allowed=may, sampling=sampling, uniform=uniform)
        return found.bincount(minlength=5).tolist()

    assert counts(Sampling(1.0), 0, 1, 2, 3, 4) == [1000, 4000, 0, 2500, 2500]
    assert counts(Sampling(1.0), 0, 1, 2) == [2000, 8000, 0, 0, 0]
    assert counts(Sampling(0.5), 0, 1) == pytest.approx([588, 9412, 0, 0, 0], abs=1)
    assert counts(Sampling(1.0, top_p=0.6), 0, 1, 2, 3, 4) == pytest.approx(
        [0, 6154, 0, 3846, 0], abs=1
    )
    assert counts(Sampling(1e-300), 0, 3, 4) == [0, 0, 0, 5000, 5000]
    assert counts(Sampling(), 0, 3) == [0, 0, 0, 10_000, 0]
    uniform = torch.zeros(1, dtype=torch.float64)
    logits = logits[:1]
    assert counts(Sampling(1.0), 2, 3, 4) == [0, 0, 0, 1, 0]  # what has no probability is not first


def test_the_most_probable_part_is_the_fewest_ids() -> None:
    probabilities = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]])
    for fraction, first, second in (
        (0.7, [0.5, 0, 0.3, 0], [0, 0, 0.3, 0.4]),
        (0.75, [0.5, 0, 0.3, 0], [0, 0.2, 0.3, 0.4]),
        (0.5, [0.5, 0, 0, 0], [0, 0, 0.3, 0.4]),
        (0.01, [0.5, 0, 0, 0], [0, 0, 0, 0.4]),
        (1.0, [0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]),
    ):
        expected = torch.tensor([first, second])
        torch.testing.assert_close(most_probable(probabilities, fraction=fraction), expected)


def test_uniform_numbers_are_functions_of_seed_stream_and_step() -> None:
    found = [x for step in range(20) for x in uniforms(7, streams=list(range(100)), step=step)]
    assert uniforms(7, streams=[42], step=3) == [found[342]]
    assert uniforms(8, streams=[42], step=3) != [found[342]]
    assert len(set(found)) == 2000
    assert all(0 <= x < 1 for x in found)
    assert np.mean(found) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_model_without_numbers_is_refused(tokenizer: Tokenizer, broken: float) -> None:
    model = built()
    with torch.no_grad():
        model.norm.weight[0] = broken
    with pytest.raises(UserError, match="training has diverged; give an earlier --step"):
        generate(model, prompts(), tokenizer=tokenizer, max_tokens=2)


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ("two green", "two green squares"),
        ("the small red circle stands", "the small red circle stands above two"),
        ("", "two green"),
        ("two green ", "two green  squares"),
        ("sq", "squares"),
    ],
)
def test_text_goes_on_where_the_prompt_ends(
    tokenizer: Tokenizer, prompt: str, written: str
) -> None:
    """Decoding alone would lose the space between them."""
    before, both = tokenizer.encode(prompt), tokenizer.encode(written)
    if both[: len(before)] == before:
        rest = tokenizer.decode(both[len(before) :], after=before)
        assert prompt + rest == written
    else:
        assert tokenizer.decode([*before, *both]) == prompt + tokenizer.decode(both, after=before)


@pytest.mark.parametrize(
    ("kind", "room", "error"),
    [
        (ImageKind.none, 64, r"prompt 1 has an image but model.image.kind is none"),
        (ImageKind.patches, 62, r"prompt 2 has 50 tokens and --max-tokens is 13, but .* most 62"),
        (ImageKind.patches, 63, None),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(
    tokenizer: Tokenizer, kind: ImageKind, room: int, error: str | None
) -> None:
    with pytest.raises(UserError, match=error) if error else nullcontext() as refusal:
        check_prompts(
            prompts(),
            tokenizer=tokenizer,
            model=ModelConfig(vocab_size=512, image=replace(corpora.IMAGE, kind=kind)),
            max_tokens=13,
            context_tokens=room,
        )
    assert (refusal is None) == (error is None)
