"""A folder of `transformers` as given weights: what its model is, and its tensors by our names.

Three kinds are known: exports of this project, which have our names, Llamas, and open_lm's.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmm.config import BlockConfig, ModelConfig
from nmm.errors import UserError
from nmm.model import open_lm

WEIGHTS, INDEX, PIECES = "model.safetensors", "model.safetensors.index.json", "tokenizer.model"
# Some files have these, though they follow from the configuration.
COMPUTED = ("rotary_emb.inv_freq", "pos_embed.inv_freq")


@dataclass(frozen=True)
class Stored:
    """A tensor that is given: its shape, its type in the file, and how it is read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def weight_files(folder: Path, *, key: str) -> list[Path]:
    """The files that hold the tensors; raises UserError."""
    if (folder / INDEX).exists():
        found = _json(folder / INDEX, key=key).get("weight_map")
        if isinstance(found, dict) and found:
            names = sorted({str(name) for name in found.values()})
            if outside := [name for name in names if name in ("", "..") or Path(name).name != name]:
                raise UserError(
                    f"{key} is {folder}, whose {INDEX} names {outside[0]}, which is no file of the "
                    f"folder; put the files into it, under their names."
                )
            return [folder / name for name in names]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    raise UserError(
        f"{key} is {folder}, which has neither {WEIGHTS} nor {INDEX}; give a folder that "
        f"transformers or `python -m nmm.export` wrote, or a safetensors file."
    )


def check_folder(folder: Path, *, key: str, config: ModelConfig, tokenizer_hash: str) -> None:
    """Refuse a model that is built otherwise, or whose ids mean other pieces; raises UserError."""
    asked = _asked(_json(folder / "config.json", key=key), folder=folder, key=key)
    group, blocks, have = "model", config, decoder_keys(config)
    if key == "weights.vision":
        assert config.encoder is not None, "Config refuses weights.vision without an encoder"
        group, blocks, have = "model.vision", config.encoder, block_keys(config.encoder)
    if blocks.kv_heads is None and asked["kv_heads"] == asked["heads"]:
        del asked["kv_heads"]  # they follow the heads, once these are set
    differing = [f"{group}.{name}={_plain(x)}" for name, x in asked.items() if have[name] != x]
    if differing:
        raise UserError(
            f"{key} is {folder}, whose model is built otherwise; set {' '.join(differing)}."
        )
    if key == "weights.decoder":
        _check_tokenizer(folder / PIECES, key=key, tokenizer_hash=tokenizer_hash)


def block_keys(blocks: BlockConfig) -> dict[str, object]:
    """What a stack of blocks computes; shapes do not tell heads, nor norms and their places."""
    return {
        "width": blocks.width,
        "depth": blocks.depth,
        "heads": blocks.heads,
        "kv_heads": blocks.key_heads,
        "norm": blocks.norm.name,
        "norm_position": blocks.norm_position.name,
        "norm_eps": blocks.norm_eps,
        "qk_norm": blocks.qk_norm.name,
        "ffn": blocks.ffn.name,
        "ffn_hidden": blocks.hidden,
        "biases": blocks.biases,
    }


def decoder_keys(config: ModelConfig) -> dict[str, object]:
    """The same of a decoder."""
    return {
        **block_keys(config),
        "tied_head": config.tied_head,
        "positions": config.positions.name,
        "rope_theta": config.rope_theta,
    }


def _asked(facts: Mapping[str, Any], *, folder: Path, key: str) -> dict[str, object]:
    """Our keys, with the values that the folder's configuration has for them."""
    kind = facts.get("model_type")
    try:
        if kind == "llama" and key == "weights.decoder":
            return _llama_keys(facts, folder=folder)
        if open_lm.is_open_lm(facts) and key == "weights.decoder":
            return open_lm.keys(facts, folder=folder)
        if kind == "nmm" and key == "weights.decoder":
            blocks = _block_keys_of(facts["blocks"])
            others = {name: facts[name] for name in ("positions", "rope_theta")}
            return {**blocks, **others, "tied_head": facts["tie_word_embeddings"]}
        if kind == "nmm" and facts["vision"]:
            return _block_keys_of(facts["vision"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{key} is {folder}, whose config.json has no {error}; restore it."
        ) from None
    known = "an export" if key == "weights.vision" else "a Llama, an open_lm or an export"
    raise UserError(
        f"{key} is {folder}, whose config.json says model_type {kind!r}"
        f"{' without an encoder' if kind == 'nmm' else ''}; give the folder of {known}, or a "
        f"safetensors file with the names of nmm/model/."
    )


def _block_keys_of(blocks: Mapping[str, Any]) -> dict[str, object]:
    """Of an export; older ones have as many heads of keys as of queries, and do not say so."""
    said = {"kv_heads": blocks["heads"], **blocks}
    return {name: said[name] for name in block_keys(BlockConfig())}


def _llama_keys(facts: Mapping[str, Any], *, folder: Path) -> dict[str, object]:
    """Of LlamaConfig; its rotary keys moved into `rope_parameters` with version 5."""
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    for name, value, plain in (
        ("hidden_act", facts.get("hidden_act", "silu"), "silu"),
        ("rope_type", scaling, "default"),
    ):
        if value != plain:
            raise UserError(
                f"weights.decoder is {folder}, whose config.json says {name} {value!r}, which "
                f"no model here has; give a Llama with {plain!r}."
            )
    return {
        "width": facts["hidden_size"],
        "depth": facts["num_hidden_layers"],
        "heads": facts["num_attention_heads"],
        "kv_heads": facts.get("num_key_value_heads") or facts["num_attention_heads"],
        "norm": "rms",
        "norm_position": "pre",
        "norm_eps": facts["rms_norm_eps"],
        "qk_norm": "none",
        "ffn": "swiglu",
        "ffn_hidden": facts["intermediate_size"],
        "biases": False,
        "tied_head": facts.get("tie_word_embeddings", False),
        "positions": "rope",
        "rope_theta": float(rope.get("rope_theta", facts.get("rope_theta", 10_000.0))),
    }


def _check_tokenizer(path: Path, *, key: str, tokenizer_hash: str) -> None:
    if not path.exists():
        raise UserError(
            f"{key} is {path.parent}, which has no {PIECES} to compare with data.tokenizer, and "
            f"other ids would make its weights worthless; put its sentencepiece model there."
        )
    if sha256(path.read_bytes()).hexdigest() != tokenizer_hash:
        raise UserError(
            f"{key} is {path.parent}, whose {PIECES} is not the one of data.tokenizer, so that "
            f"ids would mean other pieces; set data.tokenizer={path}, and index the shards with it."
        )


def by_our_names(stored: Mapping[str, Stored], *, config: ModelConfig) -> dict[str, Stored]:
    """The tensors of a Llama or an open_lm under our names; other names stay.

    Where ours are one, a Llama's are joined.
    """
    found = {name: x for name, x in stored.items() if not name.endswith(COMPUTED)}
    if (prefix := open_lm.prefix(found)) is not None:
        return _of_open_lm(found, prefix=prefix, config=config)
    if "model.embed_tokens.weight" not in found:
        return found
    for ours, theirs in _llama_names(config.depth).items():
        if all(name in found for name in theirs):
            found[ours] = _joined([found.pop(name) for name in theirs])
    return found


def _of_open_lm(found: dict[str, Stored], *, prefix: str, config: ModelConfig) -> dict[str, Stored]:
    names = {f"{prefix}{theirs}": ours for ours, theirs in open_lm.names(config.depth).items()}
    renamed = {names.get(name, name): x for name, x in found.items()}
    if config.tied_head and "head.weight" in renamed:  # a file may have one of the two, or both
        renamed.setdefault("embedding.weight", renamed["head.weight"])
        del renamed["head.weight"]
    return renamed


def _llama_names(depth: int) -> dict[str, list[str]]:
    names = {
        "embedding.weight": ["model.embed_tokens.weight"],
        "norm.weight": ["model.norm.weight"],
        "head.weight": ["lm_head.weight"],
    }
    for layer in range(depth):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        queries, ffn = f"{theirs}.self_attn", f"{theirs}.mlp"
        names |= {
            f"{ours}.attention_norm.weight": [f"{theirs}.input_layernorm.weight"],
            f"{ours}.attention.qkv.weight": [f"{queries}.{x}_proj.weight" for x in "qkv"],
            f"{ours}.attention.out.weight": [f"{queries}.o_proj.weight"],
            f"{ours}.ffn_norm.weight": [f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.ffn.gate_up.weight": [f"{ffn}.{x}_proj.weight" for x in ("gate", "up")],
            f"{ours}.ffn.down.weight": [f"{ffn}.down_proj.weight"],
        }
    return names


def _joined(parts: list[Stored]) -> Stored:
    """Along the first axis."""
    height = sum(part.shape[0] for part in parts)
    return Stored(
        (height, *parts[0].shape[1:]),
        parts[0].dtype,
        lambda: torch.cat([part.read() for part in parts]),
    )


def _plain(value: object) -> str:
    """As an override has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json(path: Path, *, key: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        reason = None if isinstance(found, dict) else "it is no object"
    except (OSError, ValueError) as error:
        found, reason = {}, error.strerror if isinstance(error, OSError) else error
    if reason is not None:
        raise UserError(
            f"{key} is {path.parent}, whose {path.name} cannot be read ({reason}); restore it."
        )
    return found
