"""Dense models of open_lm (mlfoundations/open_lm, DCLM): what they are, and our names for theirs.

A folder has config.json, as open_lm's wrapper for `transformers` saves it or one of open_lm's own
model configurations, and safetensors. open_lm's defaults stand for what it does not say.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nmm.errors import UserError

KIND = "openlm"
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
GAIN_ONLY = ("gain_only_layer_norm", "gain_only_lp_layer_norm")
# (key, open_lm's default, the values that a model here can have)
PLAIN = (
    ("positional_embedding_type", "rotary", ("rotary",)),
    ("ffn_type", "swiglu", ("swiglu", "swiglu_torch")),
    ("model_norm", "default_layer_norm", (*GAIN_ONLY, "rms_norm")),
    ("post_embed_norm", False, (False,)),
    ("moe_freq", 0, (0,)),
)


def is_open_lm(facts: Mapping[str, Any]) -> bool:
    """Is this config.json of open_lm? Its own model configurations have no model_type."""
    own = "model_type" not in facts and {"hidden_dim", "n_layers"} <= facts.keys()
    return facts.get("model_type") == KIND or own


def keys(facts: Mapping[str, Any], *, folder: Path) -> dict[str, object]:
    """Our keys with its values; raises UserError for what no model here has, and KeyError."""
    said = {**(facts.get("params_args_dict") or {}), **facts}
    for name, default, known in PLAIN:
        if (value := said.get(name, default)) not in known:
            raise UserError(
                f"weights.decoder is {folder}, whose config.json says {name} {value!r}, which no "
                f"model here has; give an open_lm with {' or '.join(map(repr, known))}."
            )
    width = said["dim"] if "dim" in said else said["hidden_dim"]
    has_qk_norm = said.get("apply_qk_norm", said.get("qk_norm", False))
    return {
        "width": width,
        "depth": said["n_layers"],
        "heads": said["n_heads"],
        "kv_heads": said["n_heads"],
        "norm": "rms" if said.get("model_norm") == "rms_norm" else "layer_norm",
        "norm_position": "pre",
        "norm_eps": said.get("norm_eps", 1e-5),
        "qk_norm": "full" if has_qk_norm else "none",
        "ffn": "swiglu",
        "ffn_hidden": 256 * -(-int(8 * width / 3) // 256),
        "biases": False,
        "tied_head": said.get("weight_tying", False),
        "positions": "rope",
        "rope_theta": 10_000.0,
    }


def prefix(stored: Iterable[str]) -> str | None:
    """What stands before every name, such as "model."; None where they are not open_lm's."""
    for name in stored:
        if name.endswith((EMBEDDING, HEAD)):
            return name.removesuffix(EMBEDDING).removesuffix(HEAD)
    return None


def names(depth: int) -> dict[str, str]:
    """Our name -> its name. Both have queries, keys and values, and gate and up, as one matrix."""
    found = {"embedding.weight": EMBEDDING, "norm.weight": "norm.weight", "head.weight": HEAD}
    inside = {
        "attention_norm": "attention_norm",
        "attention.qkv": "attention.in_proj",
        "attention.q_norm": "attention.q_norm",
        "attention.k_norm": "attention.k_norm",
        "attention.out": "attention.out_proj",
        "ffn_norm": "ffn_norm",
        "ffn.gate_up": "feed_forward.w12",
        "ffn.down": "feed_forward.w3",
    }
    for layer in range(depth):
        found |= {
            f"blocks.{layer}.{ours}.weight": f"layers.{layer}.{theirs}.weight"
            for ours, theirs in inside.items()
        }
    return found
