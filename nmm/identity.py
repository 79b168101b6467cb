"""What must not change over the life of a run, and the refusal of a config that changes it."""

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from nmm.config import DATA_KEYS, Config, ParentConfig
from nmm.errors import UserError

# Keys of the identity.
TOKENIZER, CODEBOOK = "data.tokenizer (sha256)", "data.codebook (sha256)"
CORPUS, HELD_OUT = (f"data.sources ({split} fingerprint)" for split in ("corpus", "held-out"))
ORDER = "evaluation.rows_per_source (their order)"
HELD_OUT_ORDER = "by the source alone"  # another text for another order: see CHANGELOG.md
HOW_IT_IS_COMPUTED = ("attention", "loss")  # of the model, and not what


def identity_of(
    config: Config, *, corpus: Corpus, held_out: Corpus, codebook: str | None
) -> dict[str, Any]:
    """What must not change over the life of a run, by the key that the user sets it with.

    `codebook` is the sha256 of the VQ model, if one is given. How a step is spread over processes
    is not part of it: the rows of a step stay the same. The schedule may change for the steps to
    come; train.py holds it to the rate of the last step.
    """
    data = asdict(config.data)
    not_part = [*HOW_IT_IS_COMPUTED]
    not_part += [] if config.model.sparse else ["moe"]
    not_part += [] if config.model.mod.every is not None else ["mod"]
    values = {
        "model": {k: v for k, v in asdict(config.model).items() if k not in not_part},
        "weights": asdict(config.weights),
        "data": {
            **{key: data[key] for key in DATA_KEYS},
            **({"masking": data["masking"]} if config.data.masking.mean_spans else {}),
            "units": [f"{unit.value}={count}" for unit, count in config.data.units.items()],
        },
        "optim": asdict(config.optim),
        "engine": {"precision": config.engine.precision},
        "run": {"seed": config.run.seed},
        "evaluation": {"rows_per_source": config.evaluation.rows_per_source},
        "parent": _parent(config.parent),
        "data.sources": {
            name: {
                "kind": source.kind,
                "weight": source.weight,
                "text_first_fraction": source.text_first_fraction,
                "modality": source.modality,
            }
            for name, source in config.data.sources.items()
        },
    }
    return {
        TOKENIZER: corpus.tokenizer.hash,
        **({} if codebook is None else {CODEBOOK: codebook}),
        **_dotted(values),
        CORPUS: corpus.fingerprint,
        HELD_OUT: held_out.fingerprint,
        ORDER: HELD_OUT_ORDER,
    }


def _parent(config: ParentConfig) -> dict[str, Any]:
    """By the name of its folder, because runs may be moved."""
    if config.run is None:
        return {}
    return {"run": Path(config.run).absolute().name, "step": config.step, "mode": config.mode}


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} becomes {"a.b": 1}; enums become their names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value.name if isinstance(value, Enum) else value
    return flat


RESTORE = "restore the old value, or start another run with run.name=NEW"
OTHER_VERSION = (
    "continue it with the version that began it (manifest.json names the commit), or start another "
    "run with run.name=NEW"
)


def refuse_contradiction(
    saved: dict[str, Any], current: dict[str, Any], *, checkpoint: Path, remedy: str = RESTORE
) -> None:
    """Stop when the config asks to continue with another model, corpus or global batch."""
    for key in [*saved, *(key for key in current if key not in saved)]:
        if saved.get(key) != current.get(key):
            raise UserError(
                f"{key} is {current.get(key)} but the checkpoint {checkpoint} was made with "
                f"{saved.get(key)}; {OTHER_VERSION if key == ORDER else remedy}."
            )
