"""`python -m nmm.model describe`: what a configuration amounts to, before anything is built."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nmm import config
from nmm.config import ModelConfig
from nmm.errors import UserError
from nmm.flops import flops_per_token, memory_bytes, num_parameters

GPUS = (1, 8, 64)

DESCRIPTION = """\
Print the size of a model, part by part, the cost of a token and the memory its training takes.
Nothing is built: the numbers follow from the configuration and are those of the built model."""

EXAMPLES = """\
examples:
  python -m nmm.model describe                                 the default, conf/model/tiny.yaml
  python -m nmm.model describe model=early_275m                a preset of conf/model/
  python -m nmm.model describe model=early_275m model.depth=12 with one value changed
  python -m nmm.model describe model=early_275m --json         for programs

the keys of a model are explained in nmm/config/model.py"""


def model_config(overrides: list[str]) -> ModelConfig:
    """The checked `model` group of conf/ with Hydra overrides; raises UserError."""
    try:
        model = OmegaConf.to_object(config.compose(overrides).model)
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(config.sentence(error)) from error
    assert isinstance(model, ModelConfig)
    return model


def facts(model: ModelConfig) -> dict[str, object]:
    """What `--json` prints."""
    parameters = num_parameters(model)
    return {
        "N": parameters.N,
        "N_active": parameters.N_active,
        "N_vision": parameters.N_vision,
        "parameters_total": parameters.total,
        "flops_per_token": flops_per_token(model),
        "parts": asdict(parameters),
    }


def table(model: ModelConfig) -> str:
    """The same for people, with the memory plan."""
    parameters = num_parameters(model)
    lines = [
        f"width {model.width}, depth {model.depth}, heads {model.heads} of {model.head_dim} "
        f"channels, feed-forward {model.ffn_hidden}, {model.vocab_size:,} ids,",
        f"{model.image.tokens} tokens per image of {model.image.side_pixels} pixels "
        f"in patches of {model.image.patch_pixels}",
        "",
        "part            parameters",
        *(f"{part:<12}{count:>14,}" for part, count in asdict(parameters).items()),
        f"{'total':<12}{parameters.total:>14,}",
        "",
        f"N           {parameters.N:>14,}   without patch and norm, as scaling laws count",
        f"N_active    {parameters.N_active:>14,}   the part of N that a token passes through",
        f"N_vision    {parameters.N_vision:>14,}   the vision encoder",
        f"FLOPs       {flops_per_token(model):>14,}   per trained token, 6 N_active",
        "",
        "GiB per GPU for weights, gradients and Adam's states in bf16 (activations come on top)",
        "ZeRO stage        1 GPU     8 GPUs    64 GPUs",
    ]
    for stage in range(4):
        row = (memory_bytes(parameters.total, zero_stage=stage, gpus=gpus) for gpus in GPUS)
        note = "   (fp32: stage 0 does not train in bf16)" if stage == 0 else ""
        lines.append(f"{stage:<11}" + "".join(f"{b / 2**30:>11.3f}" for b in row) + note)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nmm.model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["describe"], help="the one thing to do here")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides, as for train.py"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_intermixed_args(arguments)
    try:
        model = model_config(given.overrides)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(facts(model), indent=2) if given.json else table(model))


if __name__ == "__main__":
    main()
