"""A model that begins with a folder of transformers: a Llama of others, or an export of ours."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from data.tokenizer import Tokenizer
from nmm import export
from nmm.config import GivenWeights, ImageKind, ModelConfig, Norm, QKNorm, VisionConfig
from nmm.errors import UserError
from nmm.model import Model, build, check_given, load_given
from tests import corpora
from tests.batches import pack
from tests.family import EARLY, LATE
from tests.test_export import untrained
from tests.test_parity import ROWS, draw, reference_loss

IDS = 50  # of the given model; ours has 64
LLAMA = replace(EARLY, norm=Norm.rms, qk_norm=QKNorm.none, norm_eps=1e-6, ffn_hidden=48)


def llama(folder: Path, *, shard: str = "5GB", **options: Any) -> LlamaForCausalLM:
    """A random Llama and its folder, with a tokenizer beside it as its makers put it there."""
    config = LlamaConfig(
        vocab_size=IDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="eager",
        **options,
    )
    model = LlamaForCausalLM(config)
    draw(model)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.model").write_bytes(corpora.tokenizer_path().read_bytes())
    return model


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tokenizer_hash() -> str:
    return Tokenizer(corpora.tokenizer_path()).hash


def begun_with(config: ModelConfig, **given: str) -> Model:
    weights = GivenWeights(**given)
    check_given(config, weights, tokenizer_hash=tokenizer_hash())
    model = build(config, seed=0)
    load_given(model, weights)
    return model


def refusal(config: ModelConfig, **given: str) -> str:
    with pytest.raises(UserError) as caught:
        check_given(config, GivenWeights(**given), tokenizer_hash=tokenizer_hash())
    return str(caught.value)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_begins_a_model(tmp_path: Path, key_value_heads: int, tied: bool) -> None:
    """Its logits to 1e-5, keys and values shared by heads or not; new ids and patches as drawn."""
    reference = llama(
        tmp_path, shard="9KB", num_key_value_heads=key_value_heads, tie_word_embeddings=tied
    )
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    config = replace(LLAMA, tied_head=tied, kv_heads=key_value_heads)
    model, fresh = begun_with(config, decoder=str(tmp_path)), build(config, seed=0)
    assert torch.equal(model.embedding.weight[IDS:], fresh.embedding.weight[IDS:])
    assert torch.equal(model.head.weight[IDS:], fresh.head.weight[IDS:])
    assert model.patch is not None
    assert fresh.patch is not None
    assert torch.equal(model.patch.weight, fresh.patch.weight)
    batch = pack(ROWS, config=replace(config, vocab_size=IDS), row_tokens=24)
    reference_loss(reference, batch, model.logits(batch)[..., :IDS])


def test_an_old_folder_is_read_too(tmp_path: Path) -> None:
    """One file, bf16, keys as transformers 4 wrote them, and what was stored though computed."""
    llama(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    computed = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    save_file({**weights, **computed}, path)
    edit(tmp_path, rope_parameters=None, rope_scaling=None, rope_theta=5e5)
    model = begun_with(replace(LLAMA, rope_theta=5e5), decoder=str(tmp_path))
    expected = weights["model.layers.1.mlp.up_proj.weight"].float()
    assert torch.equal(model.blocks[1].ffn.gate_up.weight[48:], expected)


def test_the_keys_to_set_are_named(tmp_path: Path) -> None:
    llama(tmp_path, rms_norm_eps=1e-5, tie_word_embeddings=True)
    said = refusal(EARLY, decoder=str(tmp_path))
    assert said == (
        f"weights.decoder is {tmp_path}, whose model is built otherwise; set model.norm=rms "
        "model.qk_norm=none model.ffn_hidden=48 model.tied_head=true."
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "gpt2"},
            "says model_type 'gpt2'; give the folder of a Llama, an open_lm or an export",
        ),
        ({"hidden_act": "gelu"}, "says hidden_act 'gelu', which no model here has"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope_type 'linear'"),
        ({"num_attention_heads": 8}, "built otherwise; set model.heads=8."),
        ({"num_key_value_heads": 2}, "built otherwise; set model.kv_heads=2."),
        ({"rope_parameters": {"rope_theta": 5e5}}, "set model.rope_theta=500000.0."),
    ],
)
def test_another_llama_is_refused(tmp_path: Path, changes: dict, said: str) -> None:
    llama(tmp_path)
    edit(tmp_path, **changes)
    assert said in refusal(LLAMA, decoder=str(tmp_path))


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    llama(tmp_path, shard="9KB", attention_bias=True)
    said = refusal(LLAMA, decoder=str(tmp_path))
    assert "has model.layers.0.self_attn.k_proj.bias" in said
    llama(tmp_path / "wide", head_dim=16)
    assert "attention.qkv.weight of shape [192, 32] where" in refusal(
        LLAMA, decoder=str(tmp_path / "wide")
    )
    few = replace(LLAMA, vocab_size=IDS - 1)
    assert "embedding.weight of shape [50, 32]" in refusal(few, decoder=str(tmp_path / "wide"))
    next(tmp_path.glob("model-00002*")).unlink()
    assert "model-00002-of" in (said := refusal(LLAMA, decoder=str(tmp_path)))
    assert "does not exist" in said
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "has neither model.safetensors nor" in refusal(LLAMA, decoder=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "whose config.json cannot be read" in refusal(LLAMA, decoder=str(tmp_path))


def test_other_ids_are_refused(tmp_path: Path) -> None:
    llama(tmp_path)
    pieces = tmp_path / "tokenizer.model"
    pieces.write_bytes(b"another one")
    said = refusal(LLAMA, decoder=str(tmp_path))
    assert f"set data.tokenizer={pieces}, and index the shards with it" in said
    pieces.unlink()
    assert "has no tokenizer.model to compare" in refusal(LLAMA, decoder=str(tmp_path))


def test_an_export_begins_a_model(tmp_path: Path) -> None:
    """Both of its parts, in a model with more ids; a file alone would not tell its heads."""
    image = replace(corpora.IMAGE, kind=ImageKind.encoder)
    trained = untrained(image=image, vision=VisionConfig(width=16, depth=2, heads=2))
    export.write_export(trained, tmp_path / "out")
    out, config = str(tmp_path / "out"), trained.config.model
    more = begun_with(replace(config, vocab_size=600), decoder=out, vision=out)
    for name, given in trained.model.named_parameters():
        same = torch.equal(more.get_parameter(name)[: len(given)], given)
        assert same == (name != "connector.weight"), name
    assert "set model.heads=2." in refusal(replace(config, heads=4), decoder=out)
    shared = replace(config, heads=2, kv_heads=1)
    assert "set model.kv_heads=2." in refusal(shared, decoder=out)
    vision = replace(config.vision, heads=4, norm_eps=1e-6)
    said = refusal(replace(config, vision=vision), vision=out)
    assert "set model.vision.heads=2 model.vision.norm_eps=1e-05." in said
    begun_with(replace(config, heads=4), decoder=f"{out}/model.safetensors")
    # Exports from before keys could be shared do not say how many heads have their own.
    without = json.loads((tmp_path / "out" / "config.json").read_text())
    for blocks in (without["blocks"], without["vision"]):
        del blocks["kv_heads"]
    edit(tmp_path / "out", **without)
    begun_with(config, decoder=out, vision=out)


def test_an_encoder_comes_from_a_model_that_has_one(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    said = refusal(LATE, vision=str(tmp_path / "llama"))
    assert "says model_type 'llama'; give the folder of an export" in said
    export.write_export(untrained(), tmp_path / "out")
    said = refusal(LATE, vision=str(tmp_path / "out"))
    assert "says model_type 'nmm' without an encoder; give" in said
