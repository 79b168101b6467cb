"""`python -m nmm.model describe`: what a configuration amounts to, before anything is built."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nmm import config
from nmm.activations import activation_bytes
from nmm.config import BlockConfig, ImageKind, ModelConfig
from nmm.errors import UserError
from nmm.flops import exact_flops_per_token, flops_per_token, num_parameters, state_bytes

GPUS = (1, 8, 64)
ZERO_STAGES = range(4)
EXPERT_PARALLEL = (1, 2, 4, 8)

DESCRIPTION = """\
Print the size of a model, part by part, the cost of a token and the memory its training takes.
Nothing is built: the numbers follow from the configuration and are those of the built model."""

EXAMPLES = """\
examples:
  python -m nmm.model describe                                 the default, conf/model/tiny.yaml
  python -m nmm.model describe model=early_275m                a preset of conf/model/
  python -m nmm.model describe model=early_275m model.depth=12 with one value changed
  python -m nmm.model describe model=late_289m data.context_tokens=1024 --json     for programs

the keys of a model are explained in nmm/config/block.py and nmm/config/model.py"""


@dataclass(frozen=True)
class Described:
    """What of a configuration matters here."""

    model: ModelConfig
    context_tokens: int
    row_tokens: int
    vision_is_frozen: bool
    ids: dict[str, int]
    """Of units and of the masked objective; what else there is of the model's ids is for text."""


def describe(overrides: list[str]) -> Described:
    """The parts of conf/ with Hydra overrides, checked; raises UserError."""
    composed = config.compose(overrides)
    try:
        model, data, optim = (
            OmegaConf.to_object(composed[group]) for group in ("model", "data", "optim")
        )
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(config.sentence(error)) from error
    assert isinstance(model, ModelConfig)
    assert isinstance(data, config.DataConfig)
    assert isinstance(optim, config.OptimConfig)
    config.check_vocabulary(model, data)
    return Described(
        model,
        context_tokens=data.context_tokens,
        row_tokens=data.row_tokens,
        vision_is_frozen=optim.vision_rate_multiplier == 0,
        ids=data.ids_behind_text,
    )


def facts(described: Described) -> dict[str, object]:
    """What `--json` prints."""
    model, context = described.model, described.context_tokens
    parameters = num_parameters(model)
    return {
        "N": parameters.N,
        "N_active": parameters.N_active,
        "N_text": parameters.N_text,
        "N_vision": parameters.N_vision,
        "parameters_total": parameters.total,
        "flops_per_token": flops_per_token(model),
        "flops_per_image_token": flops_per_token(model, is_image=True),
        "ids": {**described.ids, "text": model.vocab_size - sum(described.ids.values())},
        "context_tokens": context,
        "exact_flops_per_token": exact_flops_per_token(model, context_tokens=context),
        "exact_flops_per_image_token": exact_flops_per_token(
            model, context_tokens=context, is_image=True
        ),
        "parts": asdict(parameters),
        "memory": [
            {"zero_stage": stage, "gpus": gpus, "expert_parallel": parts, "bytes_per_gpu": amount}
            for (stage, parts), row in memory_plan(described).items()
            for gpus, amount in row.items()
        ],
        "row_tokens": described.row_tokens,
        "activation_bytes": activations(described),
    }


def activations(described: Described) -> dict[str, dict[str, int]]:
    """What the blocks keep of a row, and of an image in the encoder: all, and when they recompute.

    A frozen encoder keeps nothing.
    """
    model = described.model
    stacks: dict[str, tuple[BlockConfig, int]] = {"row": (model, described.row_tokens)}
    if model.encoder is not None and not described.vision_is_frozen:
        stacks["image"] = (model.encoder, model.image.tokens)
    return {
        name: {
            "all": activation_bytes(blocks, tokens=tokens, recomputes=False),
            "activation_checkpointing": activation_bytes(blocks, tokens=tokens, recomputes=True),
        }
        for name, (blocks, tokens) in stacks.items()
    }


def memory_plan(described: Described) -> dict[tuple[int, int], dict[int, float]]:
    """Bytes per GPU by (ZeRO stage, engine.expert_parallel) and number of GPUs.

    What train.py would refuse is left out.
    """
    moe, parameters = described.model.sparse, num_parameters(described.model)
    frozen = parameters.vision if described.vision_is_frozen else 0
    divisors = [n for n in EXPERT_PARALLEL if n in described.model.expert_divisors]
    if described.model.auxiliary_routers:
        frozen, divisors = parameters.total - parameters.auxiliary_router, [1]
    return {
        (stage, parts): {
            gpus: state_bytes(
                described.model, zero_stage=stage, gpus=gpus, expert_parallel=parts, frozen=frozen
            )
            for gpus in GPUS
            if gpus % parts == 0
        }
        for stage in ZERO_STAGES
        for parts in (divisors if stage and moe else [1])
    }


def table(described: Described) -> str:
    """The same for people."""
    model = described.model
    parts = (_shape(described), _sizes(model), _costs(described), _memory(described))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _shape(described: Described) -> list[str]:
    model = described.model
    image = model.image
    lines = [f"decoder: {_blocks(model)}, {model.vocab_size:,} ids"]
    if described.ids:
        told = ", ".join(f"{count:,} for {name}" for name, count in described.ids.items())
        lines.append(f"ids:     {told} (with begins and ends), the rest for text")
    if model.sparse:
        lines.append(f"experts: {_experts(model)}")
    if model.mod.every is not None:
        lines.append(f"depth:   {_depth(model)}")
    if model.encoder:
        lines.append(f"encoder: {_blocks(model.encoder)}")
    if not image.reads_pixels:
        return [*lines, "images are ids" if image.kind is ImageKind.codes else "no images"]
    return [
        *lines,
        f"images:  {image.tokens} tokens for {image.side_pixels} pixels in patches of "
        f"{image.patch_pixels}",
    ]


def _blocks(blocks: BlockConfig) -> str:
    shared = f" ({blocks.key_heads} of keys)" if blocks.key_heads < blocks.heads else ""
    return (
        f"width {blocks.width}, depth {blocks.depth}, heads {blocks.heads} of {blocks.head_dim} "
        f"channels{shared}, {blocks.ffn.name} {blocks.hidden}"
    )


def _experts(model: ModelConfig) -> str:
    sizes = ", ".join(
        f"{count} for {'all tokens' if name == 'all' else name}"
        for name, count in model.moe.sizes.items()
    )
    return f"{sizes} in every block, swiglu {model.expert_hidden}, {model.moe.routing.name}"


def _depth(model: ModelConfig) -> str:
    layers = model.mod.layers(model.depth)
    return f"{layers} of {model.depth} blocks take {100 * model.mod.capacity:g} % of the tokens"


def _sizes(model: ModelConfig) -> list[str]:
    parameters = num_parameters(model)
    parts = {part: count for part, count in asdict(parameters).items() if count}
    return [
        f"{'part':<18}{'parameters':>15}",
        *(
            f"{part:<18}{count:>15,}"
            for part, count in {**parts, "total": parameters.total}.items()
        ),
        "",
        f"{'N':<18}{parameters.N:>15,}   matrices of ids, blocks and head, as scaling laws count",
        f"{'N_active':<18}{parameters.N_active:>15,}   the part of N that a token passes through",
        f"{'N_text':<18}{parameters.N_text:>15,}   the decoder",
        f"{'N_vision':<18}{parameters.N_vision:>15,}   the vision encoder",
    ]


def _costs(described: Described) -> list[str]:
    """Training FLOPs of a token, by the laws' convention and exactly, in two columns."""
    model, context = described.model, described.context_tokens
    lines = [f"{'training FLOPs of':<18}{'convention':>18}{'exact':>18}"]
    for name, is_image in (("a text token", False), ("an image token", True)):
        if is_image and not model.image.reads_pixels:
            continue
        by_convention = flops_per_token(model, is_image=is_image)
        exact = exact_flops_per_token(model, context_tokens=context, is_image=is_image)
        lines.append(f"{name:<18}{by_convention:>18,}{exact:>18,}")
    return [
        *lines,
        "convention: 6 N_text, 6 (N_text + N_vision) for images, without idle experts, which",
        "losses.jsonl counts (2 in place of 6 where all but auxiliary routers is frozen); exact:",
        f"with attention in documents of {context} tokens (data.context_tokens), logits at labels,",
        "experts that a token passes through",
    ]


def _memory(described: Described) -> list[str]:
    plan = memory_plan(described)
    lines = [
        "GiB per GPU for weights, gradients and Adam's states in bf16",
        f"{'ZeRO stage':<11}" + "".join(f"{gpus:>8} GPU" for gpus in GPUS),
    ]
    for (stage, parts), row in plan.items():
        amounts = (f"{row[gpus] / 2**30:>12.3f}" if gpus in row else f"{'-':>12}" for gpus in GPUS)
        note = "   (fp32: stage 0 does not train in bf16)" if stage == 0 else ""
        note += f"   engine.expert_parallel={parts}" if parts > 1 else ""
        lines.append(f"{stage if parts == 1 else '':<11}" + "".join(amounts) + note)
    lines += [
        "",
        "on top, what the blocks keep for the way back; with engine.activation_checkpointing",
    ]
    for name, kept in activations(described).items():
        said = f"each row of {described.row_tokens:,} tokens" if name == "row" else "each image"
        lines.append(f"{said:<32}" + "".join(f"{b / 2**30:>11.3f}" for b in kept.values()))
    return lines


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
        described = describe(given.overrides)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(facts(described), indent=2) if given.json else table(described))


if __name__ == "__main__":
    main()
