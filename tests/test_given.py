"""A model that begins with given weights: taken whole, or refused with what does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nmm.config import GivenWeights, ModelConfig, compose, load
from nmm.errors import UserError
from nmm.model import Model, build, check_given, load_given
from tests.family import EARLY, FAMILY, LATE, TEXT

NO_PIXELS = ["~data.sources.caption", "~data.sources.interleaved"]
CODES = ["data=demo_codes", "model.image.kind=codes"]


def save(model: Model, path: Path, **changes: torch.Tensor | None) -> str:
    """A file of the model's parameters; with None a name is left out."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return str(path)


def begun_with(config: ModelConfig, given: GivenWeights) -> dict[str, torch.Tensor]:
    check_given(config, given, tokenizer_hash="")
    model = build(config, seed=0)
    load_given(model, given)
    return dict(model.named_parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_a_decoder_of_text_begins_a_late_fusion_model(tmp_path: Path, whole: bool) -> None:
    """From a file of the decoder, or of a whole model of another kind."""
    donor = build(EARLY if whole else TEXT, seed=1)
    given = GivenWeights(decoder=save(donor, tmp_path / "decoder.safetensors"))
    new, fresh = begun_with(LATE, given), dict(build(LATE, seed=0).named_parameters())
    donated = dict(donor.named_parameters())
    for name, p in new.items():
        is_new = name.startswith(("vision.", "connector."))
        assert torch.equal(p, fresh[name] if is_new else donated[name]), name
    assert not torch.equal(new["head.weight"], fresh["head.weight"])


def test_both_parts_from_one_file_in_half_precision(tmp_path: Path) -> None:
    donor = build(LATE, seed=1).bfloat16()
    path = save(donor, tmp_path / "late.safetensors")
    new = begun_with(LATE, GivenWeights(decoder=path, vision=path))
    for name, p in donor.named_parameters():
        assert new[name].dtype == torch.float32
        assert torch.equal(new[name], p.float()) == (name != "connector.weight"), name


def test_a_tied_decoder_is_given_once(tmp_path: Path) -> None:
    config = FAMILY["metaseq"]
    donor = build(config, seed=1)
    path = save(donor, tmp_path / "tied.safetensors")
    new = begun_with(config, GivenWeights(decoder=path))
    assert all(torch.equal(new[name], p) for name, p in donor.named_parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm__weight": None}, "which lacks norm.weight; give weights of the same model"),
        ({"novel": torch.ones(2)}, "which has novel, unknown to the model"),
        (
            {"norm__weight": torch.ones(31)},
            r"has norm.weight of shape \[31\] where the model has \[32\] \(1 differ\)",
        ),
        (
            {"norm__weight": None, "one": torch.ones(2), "head__weight": torch.ones(2, 2)},
            "lacks norm.weight and has one, unknown to the model and has head.weight of shape",
        ),
        ({"norm__weight": torch.ones(32, dtype=torch.int8)}, "norm.weight as I8"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict, said: str) -> None:
    path = save(build(TEXT, seed=1), tmp_path / "decoder.safetensors", **changes)
    with pytest.raises(UserError, match=f"weights.decoder is .*decoder.safetensors.*{said}"):
        check_given(TEXT, GivenWeights(decoder=path), tokenizer_hash="")


def test_many_missing_names_are_counted(tmp_path: Path) -> None:
    path = save(build(TEXT, seed=1), tmp_path / "text.safetensors")
    with pytest.raises(UserError, match=r"weights.vision is .* which lacks .* and 16 more"):
        check_given(LATE, GivenWeights(vision=path), tokenizer_hash="")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    missing, broken = tmp_path / "none.safetensors", tmp_path / "broken.safetensors"
    broken.write_bytes(b"not tensors at all")
    with pytest.raises(UserError, match=r"which does not exist; give a safetensors file"):
        check_given(TEXT, GivenWeights(decoder=str(missing)), tokenizer_hash="")
    with pytest.raises(UserError, match=r"which cannot be read \(.*\); give a safetensors file"):
        check_given(TEXT, GivenWeights(decoder=str(broken)), tokenizer_hash="")


def test_an_encoder_for_a_model_without_one_is_refused() -> None:
    asked = ["schedule.total_steps=9", "weights.vision=x.safetensors"]
    with pytest.raises(UserError, match=r"weights.vision is x.safetensors and model.image.kind"):
        load(compose(asked))
    settings = load(compose([*asked, "model=tiny_late"]))
    assert replace(settings.weights, vision=None) == GivenWeights()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.image.kind=patches", "data=demo_codes"],
            "model.image.kind is patches and data.units has image, .* set model.image.kind=codes",
        ),
        (["model.heads=3"], "model.heads is 3 and model.width is 128; the heads must divide"),
        (
            ["model.vocab_size=5"],
            r"model.vocab_size is 5, but there are at least 6 ids \(6 for text\); set model.vocab",
        ),
        (
            [*CODES, "model.vocab_size=519"],
            r"model.vocab_size is 519, .* at least 520 ids \(6 for text, 514 for image\); set",
        ),
        (
            ["model.vocab_size=600", "data.masking.mean_spans=1", "+data.units.speech=100"],
            r"model.vocab_size is 600, .* 621 ids \(6 for text, 102 for speech, 513 for masks\)",
        ),
        (["model.image.kind=none"], "model.image.kind is none and data.sources.caption.kind"),
        (
            ["model.positions=learned", "model.max_positions=100"],
            "data.context_tokens is 512 and model.max_positions is 100",
        ),
        (["data.context_tokens=64"], "data.context_tokens is 64 but an image"),
        (
            ["model=tiny_late", "+data.units.image=9"],
            "model.image.kind is encoder and data.units has image",
        ),
        (
            ["model=tiny_late", *NO_PIXELS],
            "model.image.kind is encoder and no source of data.sources has images for it; set",
        ),
        (
            ["model.image.kind=none", "model.image_attention=prefix", *NO_PIXELS],
            "model.image_attention is prefix and no source of data.sources has images",
        ),
        (
            ["optim.vision_rate_multiplier=0"],
            "optim.vision_rate_multiplier is 0.0 and model.image.kind is patches, without",
        ),
        (
            ["model.positions=learned", "model.max_positions=512", "model.rope_theta=5e5"],
            "model.rope_theta is 500000.0 and model.positions is learned",
        ),
        (
            [*CODES, "model.image_attention=causal"],
            "model.image_attention is causal and model.image.kind is codes, which are read",
        ),
        (
            [*CODES, "model.image_attention=prefix"],
            "model.image_attention is prefix and model.image.kind is codes, which are read",
        ),
        (["optim=sgd", "optim.beta2=0.9"], "optim.beta2 is 0.9 and optim.name is sgd"),
        (["optim.weight_decay=1.1"], "optim.weight_decay is 1.1; it is a fraction"),
        (
            ["model.image.kind=none", "data=demo_codes"],
            "model.image.kind is none and data.units has image",
        ),
        (
            ["model.image.kind=codes", "+data.units.image=9"],
            "model.image.kind is codes and data.sources.caption.kind is caption, whose images",
        ),
        (
            ["model=chameleon_7b", "~data.sources.caption", "~data.sources.interleaved"],
            "model.image.kind is codes and data.units does not say how many",
        ),
    ],
)
def test_groups_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(compose(["schedule.total_steps=9", *overrides]))
