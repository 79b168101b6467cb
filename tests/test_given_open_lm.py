"""A model that begins with a folder of open_lm, against its block written out here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from nmm.config import Norm, QKNorm
from nmm.model import build
from tests import corpora
from tests.batches import pack
from tests.family import EARLY
from tests.test_given_folder import begun_with, refusal

IDS, WIDTH, DEPTH, HEADS, HIDDEN = 50, 32, 2, 4, 256
DCLM = {
    "model_type": "openlm",
    "params_args_dict": {
        "model_norm": "gain_only_lp_layer_norm",
        "qk_norm": True,
        "ffn_type": "swiglu_torch",
        "positional_embedding_type": "rotary",
    },
    **{"dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "norm_eps": 1e-5, "vocab_size": IDS},
    **{"seq_len": 64, "post_embed_norm": False, "weight_tying": False},
}
OURS = replace(EARLY, width=WIDTH, depth=DEPTH, heads=HEADS)
Weights = dict[str, Tensor]


def drawn(*, qk_norm: bool = True) -> Weights:
    """Weights under open_lm's names, large enough for attention that is far from uniform."""
    shapes = {"tok_embeddings": (IDS, WIDTH), "output": (IDS, WIDTH), "norm": (WIDTH,)}
    for layer in range(DEPTH):
        of_layer = {
            "attention_norm": (WIDTH,),
            "attention.in_proj": (3 * WIDTH, WIDTH),
            "attention.out_proj": (WIDTH, WIDTH),
            "ffn_norm": (WIDTH,),
            "feed_forward.w12": (2 * HIDDEN, WIDTH),
            "feed_forward.w3": (WIDTH, HIDDEN),
        }
        norms = {"attention.q_norm": (WIDTH,), "attention.k_norm": (WIDTH,)} if qk_norm else {}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in (of_layer | norms).items()}
    draw = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=draw)
        * (2.0 if len(shape) == 1 else shape[1] ** -0.5)
        for name, shape in shapes.items()
    }


def write(folder: Path, weights: Weights, *, before: str = "model.", **facts: Any) -> str:
    """The folder as open_lm's wrapper for transformers saves it, with a tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{before}{name}": x for name, x in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**DCLM, **facts}))
    (folder / "tokenizer.model").write_bytes(corpora.tokenizer_path().read_bytes())
    return str(folder)


def rotated(x: Tensor) -> Tensor:
    """[L, heads, E] with pairs (i, i + E/2) turned by position / 10000 ** (2i / E)."""
    length, _, channels = x.shape
    angle = torch.arange(length)[:, None] / 10_000 ** (
        torch.arange(0, channels, 2).float() / channels
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def open_lm(weights: Weights, ids: Tensor, *, rms: bool = False) -> Tensor:
    """[L, IDS]: the logits of a document, by the published definition of open_lm's Transformer."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x if rms else x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    x, length = weights["tok_embeddings.weight"][ids], len(ids)
    for layer in range(DEPTH):
        at = f"layers.{layer}."
        h = norm(x, f"{at}attention_norm.weight")
        q, k, v = (h @ weights[f"{at}attention.in_proj.weight"].T).chunk(3, dim=-1)
        if f"{at}attention.q_norm.weight" in weights:
            q = norm(q, f"{at}attention.q_norm.weight")
            k = norm(k, f"{at}attention.k_norm.weight")
        q, k, v = (y.reshape(length, HEADS, -1) for y in (q, k, v))
        scores = torch.einsum("qhe,khe->hqk", rotated(q), rotated(k)) / (WIDTH / HEADS) ** 0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        seen = torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = x + seen.reshape(length, WIDTH) @ weights[f"{at}attention.out_proj.weight"].T
        h = norm(x, f"{at}ffn_norm.weight") @ weights[f"{at}feed_forward.w12.weight"].T
        gate, up = h.chunk(2, dim=-1)
        x = x + (functional.silu(gate) * up) @ weights[f"{at}feed_forward.w3.weight"].T
    return norm(x, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize("before", ["model.", "", "module."])
@pytest.mark.parametrize(
    ("norm", "has_qk_norm"),
    [("gain_only_lp_layer_norm", True), ("gain_only_layer_norm", False), ("rms_norm", True)],
)
def test_an_open_lm_begins_a_model(
    tmp_path: Path, before: str, norm: str, has_qk_norm: bool
) -> None:
    """Its logits to 1e-5 in every document of packed rows; new ids and patches as drawn."""
    weights = drawn(qk_norm=has_qk_norm)
    said = {**DCLM["params_args_dict"], "model_norm": norm, "qk_norm": has_qk_norm}
    computed = {"layers.0.attention.pos_embed.inv_freq": torch.ones(4)}
    folder = write(tmp_path, {**weights, **computed}, before=before, params_args_dict=said)
    config = replace(
        OURS,
        norm=Norm.rms if norm == "rms_norm" else Norm.layer_norm,
        qk_norm=QKNorm.full if has_qk_norm else QKNorm.none,
    )
    model, fresh = begun_with(config, decoder=folder), build(config, seed=0)
    assert torch.equal(model.embedding.weight[IDS:], fresh.embedding.weight[IDS:])
    batch = pack([[(12,), (7,)], [(20,)]], config=replace(config, vocab_size=IDS), row_tokens=24)
    logits = model.logits(batch)[..., :IDS]
    for row in range(2):
        for document in range(1, int(batch.document[row].max()) + 1):
            here = batch.document[row] == document
            expected = open_lm(weights, batch.tokens[row, here], rms=norm == "rms_norm")
            assert expected.std() > 0.1
            torch.testing.assert_close(logits[row, here], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("left_out", [None, "output.weight", "tok_embeddings.weight"])
def test_tied_weights_are_found_under_either_name(tmp_path: Path, left_out: str | None) -> None:
    weights = drawn()
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    expected = weights["output.weight"].clone()
    weights.pop(left_out or "", None)
    folder = write(tmp_path, weights, weight_tying=True)
    model = begun_with(replace(OURS, tied_head=True), decoder=folder)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight[:IDS], expected)


def test_open_lms_own_configuration_is_read_too(tmp_path: Path) -> None:
    folder = write(tmp_path, drawn(), before="")
    own = {"hidden_dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "seq_len": 64}
    more = {"vocab_size": IDS, "post_embed_norm": False, "weight_tying": False}
    said = {"qk_norm": True, "model_norm": "gain_only_lp_layer_norm"}
    (tmp_path / "config.json").write_text(json.dumps({**own, **more, **said}))
    model = begun_with(OURS, decoder=folder)
    assert torch.equal(
        model.blocks[1].attention.qkv.weight, drawn()["layers.1.attention.in_proj.weight"]
    )


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"n_heads": 8}, "built otherwise; set model.heads=8."),
        ({"positional_embedding_type": "head_rotary"}, "'head_rotary', which no model here has"),
        ({"ffn_type": "gemma_geglu"}, "give an open_lm with 'swiglu' or 'swiglu_torch'"),
        ({"params_args_dict": None}, "says model_norm 'default_layer_norm', which no model"),
        ({"post_embed_norm": True}, "says post_embed_norm True"),
        ({"moe_freq": 2}, "says moe_freq 2"),
    ],
)
def test_another_open_lm_is_refused(tmp_path: Path, facts: dict, said: str) -> None:
    assert said in refusal(OURS, decoder=write(tmp_path, drawn(), **facts))


def test_an_open_lm_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    weights = drawn()
    del weights["layers.1.ffn_norm.weight"]
    assert "lacks blocks.1.ffn_norm.weight" in refusal(OURS, decoder=write(tmp_path, weights))
    folder = write(tmp_path, {**drawn(), "layers.2.ffn_norm.weight": torch.ones(WIDTH)})
    assert "has model.layers.2.ffn_norm.weight, unknown" in refusal(OURS, decoder=folder)
