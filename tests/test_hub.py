"""An export as `transformers` loads it, by itself: the same ids, logits, losses and texts."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, dynamic_module_utils

from data.documents import Parts
from data.tokenizer import Tokenizer
from nmm.batch import NO_LABEL, PackedBatch
from nmm.config import (
    FFN,
    ImageAttention,
    ImageKind,
    Norm,
    NormPosition,
    Positions,
    QKNorm,
    VisionConfig,
)
from nmm.export import write_export
from nmm.generate import generate
from nmm.generate.text import lay_out
from nmm.trained import Trained
from tests import corpora
from tests.test_export import untrained
from tests.test_structure import imports


@pytest.fixture(autouse=True, scope="module")
def _in_scratch() -> Iterator[None]:
    """Code of exports is copied to a folder before it is imported: not to the user's."""
    before = dynamic_module_utils.HF_MODULES_CACHE
    dynamic_module_utils.HF_MODULES_CACHE = str(corpora.scratch() / "hub-modules")
    transformers.utils.logging.disable_progress_bar()
    yield
    dynamic_module_utils.HF_MODULES_CACHE = before


@cache
def pictures() -> list[Path]:
    """At the model's size, larger and wide, transparent, turned by the camera; and a large JPEG."""
    rng = np.random.default_rng(0)
    directory = corpora.scratch() / "hub-pictures"
    directory.mkdir()
    made = []
    for number, (mode, size) in enumerate(
        [("RGB", (16, 16)), ("RGB", (90, 40)), ("RGBA", (33, 50)), ("L", (20, 61))]
    ):
        channels = len(Image.new(mode, (1, 1)).getbands())
        values = rng.integers(0, 256, (*size[::-1], channels), np.uint8).squeeze()
        made.append(directory / f"{number}.png")
        exif = Image.Exif()
        exif[0x0112] = 6 if mode == "L" else 1
        Image.fromarray(values, mode).save(made[-1], exif=exif)
    made.append(directory / "large.jpg")
    values = rng.integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(values).resize((120, 70)).save(made[-1], "JPEG")
    return made


Document = list[str | Path]


def documents(member: str = "early") -> list[Document]:
    """Images first, inside, last, beside each other and none; one that is empty."""
    if member == "llama":
        return [["two green squares"], ["the small red", "circle"], [], ["seven"], ["two"]]
    a, b, c, d, e = pictures()
    return [
        [a],
        ["the small red", b, "circle", c],
        ["two green squares"],
        ["seven", d, e],
        [],
    ]


def ours(document: Document) -> Parts:
    return [part if isinstance(part, str) else part.read_bytes() for part in document]


def theirs(document: Document) -> list[str | Image.Image]:
    return [part if isinstance(part, str) else Image.open(part) for part in document]


def sharpened(trained: Trained) -> Trained:
    """Attention that is far from uniform, gains that differ, so that a wrong use shows."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) / 4)
            if name.endswith("q_norm.weight"):
                parameter.mul_(4)
    return trained


WITHOUT_IMAGES = replace(corpora.IMAGE, kind=ImageKind.none)
FAMILY: dict[str, dict[str, Any]] = {
    "early": {},
    "late": {
        "image": replace(corpora.IMAGE, kind=ImageKind.encoder),
        "vision": VisionConfig(width=24, depth=2, heads=3, biases=True, ffn=FFN.gelu),
    },
    "llama": {"norm": Norm.rms, "qk_norm": QKNorm.none, "image": WITHOUT_IMAGES},
    "chameleon": {
        "norm": Norm.rms,
        "norm_position": NormPosition.swin,
        "qk_norm": QKNorm.head,
        "dropout": 0.3,
        "kv_heads": 1,
        "rope_theta": 500.0,
        "image_attention": ImageAttention.causal,
        "ffn_hidden": 40,
    },
    "opt": {
        "ffn": FFN.relu,
        "biases": True,
        "positions": Positions.learned,
        "max_positions": 80,
        "tied_head": True,
        "norm_eps": 1e-3,
        "image_attention": ImageAttention.prefix,
    },
}
every_member = pytest.mark.parametrize("member", FAMILY)


@cache
def exported(member: str) -> tuple[Trained, Path]:
    trained = sharpened(untrained(**FAMILY[member]))
    directory = corpora.scratch() / f"hub-{member}"
    write_export(trained, directory)
    return trained, directory


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()


def read(directory: Path, asked: list[Document]) -> Any:
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    return processor([theirs(document) for document in asked])


def batch_of(trained: Trained, document: Document) -> PackedBatch:
    image = trained.config.model.image
    return lay_out([ours(document)], tokenizer=trained.tokenizer, image=image).batch


def test_it_needs_nothing_of_ours() -> None:
    """What is imported is torch, transformers and what they need."""
    _, directory = exported("early")
    names = {
        name.partition(".")[0]
        for path in directory.glob("*.py")
        for name in imports(path.stem, ast.parse(path.read_text()))
    }
    assert names - {"collections", "dataclasses", "json"} == {
        "PIL",
        "numpy",
        "torch",
        "transformers",
    }


def test_ids_and_pixels_are_ours() -> None:
    trained, directory = exported("early")
    inputs = read(directory, documents())
    pixels = []
    for row, document in enumerate(documents()):
        batch = batch_of(trained, document)
        real = inputs["attention_mask"][row].bool()
        assert torch.equal(inputs["input_ids"][row][real], batch.tokens[0])
        assert not real[: len(real) - batch.tokens.shape[1]].any()
        pixels.append(batch.pixels)
    assert torch.equal(inputs["pixel_values"], torch.cat(pixels))


@every_member
def test_logits_are_ours(member: str) -> None:
    """Each alone, and all together with padding on their left; text, and text with images."""
    trained, directory = exported(member)
    model = load(directory)
    with torch.no_grad():
        together = model(**read(directory, documents(member))).logits
        for row, document in enumerate(documents(member)):
            expected = trained.model.logits(batch_of(trained, document))[0]
            alone = model(**read(directory, [document])).logits[0]
            torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)
            last = together[row, -len(expected) :]
            torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.3


@every_member
def test_gradients_and_loss_are_ours(member: str) -> None:
    """So that it can be tuned further; no gradient is zero."""
    trained, directory = exported(member)
    model = load(directory)
    document = documents(member)[1]
    batch, inputs = batch_of(trained, document), read(directory, [document])
    is_text = inputs["input_ids"] != trained.tokenizer.ids.image
    labels = torch.where(is_text, inputs["input_ids"], NO_LABEL)
    batch.labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    output = trained.model(batch)
    expected = output.loss_sum / len(output.positions)
    trained.model.zero_grad()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    grads = {name: parameter.grad for name, parameter in trained.model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=0, atol=1e-5)
        assert parameter.grad.any(), name


@every_member
def test_generated_texts_are_ours(member: str) -> None:
    """Greedy and in a batch, with its cache; ids that must not be written are not."""
    trained, directory = exported(member)
    asked = documents(member)
    expected = generate(
        trained.model, [ours(d) for d in asked], tokenizer=trained.tokenizer, max_tokens=8
    )
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    inputs = read(directory, asked)
    found = load(directory).generate(**inputs, max_new_tokens=8)
    new = found[:, inputs["input_ids"].shape[1] :]
    last = [d[-1] if d and isinstance(d[-1], str) else "" for d in asked]
    for document, row, written, before in zip(asked, new, expected, last, strict=True):
        text = processor.decode([*trained.tokenizer.encode(before), *row.tolist()])
        assert text == before + written.text, document
    assert len({written.text for written in expected}) == 5


def test_a_document_may_be_read_in_pieces() -> None:
    """Behind a cache, as chats do: an image of a later piece sees itself and all before it."""
    trained, directory = exported("early")
    model, document = load(directory), documents()[3]
    inputs = read(directory, [document])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    middle = ids.shape[1] - trained.config.model.image.tokens
    with torch.no_grad():
        first = model(ids[:, :middle], pixel_values=pixels[:1], use_cache=True)
        second = model(
            ids[:, middle:], pixel_values=pixels[1:], past_key_values=first.past_key_values
        )
        expected = trained.model.logits(batch_of(trained, document))
        last = model(**inputs, logits_to_keep=1).logits
    found = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-5)


@every_member
def test_it_is_saved_and_loaded_again(tmp_path: Path, member: str) -> None:
    """What `save_pretrained` writes loads too, and still is the same model."""
    _, directory = exported(member)
    model = load(directory)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    inputs = read(directory, documents(member))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_images_and_their_places_must_agree() -> None:
    _, directory = exported("early")
    model, inputs = load(directory), read(directory, documents())
    with pytest.raises(ValueError, match="has 80 image positions and pixel_values has 4 images"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][1:]})


def test_bf16_exports_load_in_bf16(tmp_path: Path) -> None:
    trained, _ = exported("early")
    write_export(trained, tmp_path / "half", dtype=torch.bfloat16)
    model = load(tmp_path / "half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    document = documents()[1]
    with torch.no_grad():
        found = model(**read(tmp_path / "half", [document])).logits[0].float()
        expected = trained.model.logits(batch_of(trained, document))[0]
    assert correlation(found, expected) > 0.999


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


TEXTS = ["two green squares", "", " 日本 é 😀", "a\nb\tc  d ", "seven <nmm:x> <b>"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pad_id": -1},
        {"bos_id": -1, "pad_id": -1, "eos_id": 1, "unk_id": 0},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity"},
    ],
)
def test_tokenizers_of_every_kind_give_our_ids_and_texts(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Also those without a piece for padding, begin or end, which get ids behind the image's."""
    path = corpora.train_tokenizer(tmp_path / "tokenizer.model", **options)
    write_export(untrained(tokenizer=path), tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = Tokenizer(path)
    for text in TEXTS:
        ids = [expected.ids.bos, *expected.encode(text)]
        assert found(text)["input_ids"] == ids
        assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids)
        ended = [expected.ids.pad, *ids, expected.ids.image, expected.ids.eos]
        assert found.decode(ended, skip_special_tokens=True) == expected.decode(ended)
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (
        *(expected.ids.pad, expected.ids.bos, expected.ids.eos),
    )
