"""A trained model as a folder for others: safetensors, configuration, tokenizer; nothing pickled.

From the shell: `python -m nmm.export --run runs/X --out DIR`. The files are listed in
nmm/trained.py; with those of nmm/hub/, `transformers` loads a dense model by itself.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizer import Tokenizer
from nmm.codes.model import read as read_codes
from nmm.config import BlockConfig, ModelConfig, read_yaml, to_yaml
from nmm.errors import UserError
from nmm.model.folder import block_keys
from nmm.model.numbered import one_by_one
from nmm.rundir import CONFIG, git_commit
from nmm.trained import (
    CODEBOOK_FOLDER,
    FACTS,
    FORMAT,
    PIECES,
    WEIGHTS,
    Trained,
    read_run,
    sum_of,
)

HUB = Path(__file__).parent / "hub"


def write_export(trained: Trained, directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the folder beside itself, read it again, compare to the bit, and give it its name.

    Raises UserError for a folder that is not empty, and for a disk that is full or lies.
    """
    beside = directory.with_name(f"{directory.name}.part")
    try:
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"--out is {directory}, which is not empty; give another folder.")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        weights = _weights(trained, dtype=dtype)
        _write(trained, beside, weights=weights)
        differing = differences(trained, weights, beside)
        if differing:
            raise UserError(
                f"--out is {directory}, where {', '.join(differing)} cannot be read back as "
                f"written; give a folder on another disk."
            )
        beside.replace(directory)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--out is {directory}, which cannot be written ({reason}); give another folder."
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def differences(trained: Trained, weights: Mapping[str, Tensor], directory: Path) -> list[str]:
    """Names of weights and files in an export that are not, to the bit, what was to be written."""
    found = load_file(directory / WEIGHTS)
    names = sorted({*weights, *found})
    differing = [n for n in names if not _same_bits(weights.get(n), found.get(n))]
    if read_yaml(directory / CONFIG) != trained.config:
        differing.append(CONFIG)
    if Tokenizer(directory / PIECES).hash != trained.tokenizer.hash:
        differing.append(PIECES)
    if (codes := trained.codes()) is not None:
        there = read_codes(directory / CODEBOOK_FOLDER, key="--out")
        differing += [] if there.sha256() == codes.sha256() else [CODEBOOK_FOLDER]
    return differing


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Also for numbers that are not equal to themselves."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _weights(trained: Trained, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter once, by its name in the file: a tied head is the embedding."""
    return one_by_one(
        {
            name: parameter.detach().to("cpu", dtype).contiguous()
            for name, parameter in trained.model.named_parameters()
        }
    )


def _write(trained: Trained, directory: Path, *, weights: dict[str, Tensor]) -> None:
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(to_yaml(trained.config), encoding="utf-8")
    # The library makes files that only their owner may read.
    (directory / WEIGHTS).chmod((directory / CONFIG).stat().st_mode)
    shutil.copyfile(trained.tokenizer.path, directory / PIECES)
    if (codes := trained.codes()) is not None:
        codes.save(directory / CODEBOOK_FOLDER)
    facts = {
        "format": FORMAT,
        "run": trained.name,
        "step": trained.step,
        "tokens": trained.tokens,
        "dtype": _name(next(iter(weights.values())).dtype),
        "tokenizer_sha256": trained.tokenizer.hash,
        "codebook_sha256": None if codes is None else codes.sha256(),
        "git_commit": git_commit(),
        "experts": _served(trained.config.model),
        "weights_sha256": {name: sum_of(weight) for name, weight in sorted(weights.items())},
    }
    if not trained.config.model.is_sparse:
        _write_hub(trained, directory, dtype=facts["dtype"])
    _json(directory / FACTS, facts)


def _served(model: ModelConfig) -> list[str] | None:
    """For every expert of a block, by number, the modality that it is for, or "all"."""
    if model.sparse is None:
        return None
    return [name for name, count in model.moe.sizes.items() for _ in range(count)]


def _write_hub(trained: Trained, directory: Path, *, dtype: str) -> None:
    """Code and configuration for AutoModelForCausalLM, AutoProcessor and AutoTokenizer."""
    for source in sorted(HUB.glob("*_nmm.py")):
        shutil.copyfile(source, directory / source.name)
    ids, image = trained.tokenizer.ids, trained.config.model.image
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    _json(
        directory / "config.json",
        {
            "model_type": "nmm",
            "architectures": ["NmmForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_nmm.NmmConfig",
                "AutoModelForCausalLM": "modeling_nmm.NmmForCausalLM",
            },
            "dtype": dtype,
            "image_token_id": ids.image,
            **special,
            **hub_keys(trained.config.model),
        },
    )
    never = [ids.pad, ids.unk, ids.bos, *range(ids.text_end, trained.config.model.vocab_size)]
    never = sorted({*never} - {ids.eos})
    _json(directory / "generation_config.json", {**special, "suppress_tokens": never})
    _json(
        directory / "processor_config.json",
        {
            "auto_map": {"AutoProcessor": "processing_nmm.NmmProcessor"},
            "bos_token_id": ids.bos,
            "pad_token_id": ids.pad,
            "image_token_id": ids.image,
            "image_tokens": image.tokens,
            "side_pixels": image.side_pixels,
        },
    )
    _json(directory / "tokenizer_config.json", _tokenizer_keys(trained.tokenizer))


def hub_keys(model: ModelConfig) -> dict[str, object]:
    """The keys of NmmConfig in nmm/hub/modeling_nmm.py that say what is built."""
    return {
        "blocks": _blocks(model),
        "vision": None if model.encoder is None else _blocks(model.encoder),
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_head,
        "image_attention": model.image_attention.name,
        "positions": model.positions.name,
        "rope_theta": model.rope_theta,
        "max_positions": model.max_positions,
        "side_pixels": model.image.side_pixels if model.image.reads_pixels else 0,
        "patch_pixels": model.image.patch_pixels,
    }


def _blocks(blocks: BlockConfig) -> dict[str, object]:
    return {**block_keys(blocks), "dropout": blocks.dropout}


def _tokenizer_keys(tokenizer: Tokenizer) -> dict[str, object]:
    """Special ids by the names of their pieces; those beyond the pieces get names of their own."""
    ids = tokenizer.ids
    special = {"pad": ids.pad, "unk": ids.unk, "bos": ids.bos, "eos": ids.eos, "image": ids.image}
    names = {
        key: tokenizer.piece(number) if number < ids.text_end else f"<nmm:{key}>"
        for key, number in special.items()
    }
    return {
        "tokenizer_class": "NmmTokenizer",
        "auto_map": {"AutoTokenizer": ["processing_nmm.NmmTokenizer", None]},
        **{f"{key}_token": names[key] for key in ("pad", "unk", "bos", "eos")},
        "extra_special_tokens": {"image_token": names["image"]},
        "added_tokens_decoder": {
            str(number): {"content": names[key], "special": True} for key, number in special.items()
        },
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def _json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nmm.export",
        description="Write the weights of a run as safetensors, with its configuration and "
        "tokenizer, and read them again to compare.",
        epilog="Examples: python -m nmm.export --run runs/demo --out demo; "
        "python -m nmm.generate --export demo --image cat.jpg",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="e.g. runs/demo")
    parser.add_argument(
        "--step", type=int, metavar="K", help="the checkpoint of this step (default: the newest)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--bf16", action="store_true", help="round the weights, for half the size")
    given = parser.parse_args(arguments)
    try:
        trained = read_run(given.run, device=torch.device("cpu"), step=given.step)
        write_export(trained, given.out, dtype=torch.bfloat16 if given.bf16 else torch.float32)
    except UserError as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in given.out.iterdir())
    print(
        f"wrote {given.out}: {trained.name}, step {trained.step:,}, {size / 1e6:,.1f} MB; read "
        f"again, it is the same to the bit"
    )
    if not trained.config.model.is_sparse:
        load = f'AutoModelForCausalLM.from_pretrained("{given.out}", trust_remote_code=True)'
        print(f"{load} loads it")
    else:
        print("transformers does not read it: sparse models have no code there")


if __name__ == "__main__":
    main()
