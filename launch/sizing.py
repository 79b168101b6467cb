"""Print how the presets fit on GPUs: ZeRO stage, memory per GPU, and the micro-batch that is left.

States are those of nmm/flops.py. Activations are what autograd keeps, counted on a CPU, and
those of experts for an even load; 4 GB and a tenth of the GPU are left for buckets, kernels and
fragments. Nothing here was measured on a GPU.
"""

import argparse
import sys
from collections.abc import Iterator

from nmm.activations import activation_bytes
from nmm.config import DataConfig, ModelConfig, compose, load
from nmm.errors import UserError
from nmm.flops import state_bytes
from nmm.scaling.rules import GPU_BYTES, zero_stage

PRESETS = (
    *("early_275m", "early_464m", "early_932m", "early_1p63b", "early_2p28b"),
    *("early_3p35b", "early_8p13b"),
    *("moe_8e_275m", "moe_8e_932m", "moe_8e_3p35b"),
)
GPUS = (8, 64)
USABLE_FRACTION = 0.9
RESERVED_BYTES = 4e9
GIB = 2**30

HEADER = (
    "| model | GPUs | `engine=` | `engine.expert_parallel` | states, GiB per GPU | rows at once "
    "| with `activation_checkpointing` |\n|---|---|---|---|---|---|---|"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.sizing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", choices=[*GPU_BYTES], default="H100", help="(%(default)s)")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=GPUS, help="how many there are (8 64)"
    )
    parser.add_argument(
        "--models", nargs="+", default=PRESETS, help="presets of conf/model without an encoder"
    )
    options = parser.parse_args(arguments)
    try:
        rows = list(table(options.models, gpu=options.gpu, gpus=options.gpus))
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n".join([HEADER, *rows]))


def table(presets: list[str], *, gpu: str, gpus: list[int]) -> Iterator[str]:
    """Lines of Markdown for each model and number of GPUs: experts whole, and divided most."""
    for preset in presets:
        model = load(compose([f"model={preset}", "schedule.total_steps=1"])).model
        if model.encoder is not None:
            raise UserError(
                f"--models names {preset}, which has an encoder; its memory depends on the share "
                f"of images: see python -m nmm.model describe model={preset}."
            )
        for number in gpus:
            divisors = [n for n in model.expert_divisors if number % n == 0]
            for parts in sorted({1, divisors[-1]}):
                stage = zero_stage(model, gpus=number, gpu=gpu, expert_parallel=parts)
                states = state_bytes(model, zero_stage=stage, gpus=number, expert_parallel=parts)
                room = USABLE_FRACTION * GPU_BYTES[gpu] - RESERVED_BYTES - states
                cells = [
                    f"`{preset}`",
                    f"{number}",
                    f"`zero{stage}`",
                    f"{parts}",
                    f"{states / GIB:.1f}",
                    *(f"{rows_in(room, model, recomputes=choice)}" for choice in (False, True)),
                ]
                yield f"| {' | '.join(cells)} |"


def rows_in(room_bytes: float, model: ModelConfig, *, recomputes: bool) -> int:
    """How many rows of the default length have their activations in that room."""
    row = activation_bytes(model, tokens=DataConfig().row_tokens, recomputes=recomputes)
    return max(0, int(room_bytes // row))


if __name__ == "__main__":
    main()
