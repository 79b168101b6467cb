"""A layer of experts against the dense layer that costs as much per token, beside two peers.

    python -m bench.moe [--dtype fp32] [--tokens 4096] [--width 512] [--hidden 1408] [--rounds 15]

Every contender is a feed-forward layer whose tokens each pass through one SwiGLU of the same size:
the dense layer of nmm/model/layers.py, our layer of 8 experts by each way of routing, Mixtral's
block of transformers with its grouped products, and DeepSpeed's own MoE layer, with room for an
even share of the tokens on every expert (it drops the others). Routers, their losses if the layer
has any, and the way back into the order of the tokens are in the time. "Experts alone" is what is
left of our layer without all that: their products, on tokens that lie sorted already, with as many
on every expert as a random router of token choice gave them, or as many on each.

A time is that of a forward and a backward pass, which makes the gradients of inputs and weights
anew. Every round times every contender once, in an order that turns; a ratio is the median over
rounds of a contender's time divided by the dense layer's in the same round. The same of the
processor time of all threads is less disturbed by others on the machine (with
OMP_WAIT_POLICY=passive, so that threads do not spin while they wait).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmm import parallel
from nmm.batch import Modality
from nmm.config import ExpertGroups, ModelConfig, MoEConfig, Routing
from nmm.inside_deepspeed import DEEPSPEED_VERSION
from nmm.model.experts import Experts
from nmm.model.layers import SwiGLU
from nmm.model.moe import MoE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPERTS, ROWS = 8, 2
Layer = Callable[[Tensor], tuple[Tensor, ...]]  # the output first, then losses of the layer


@dataclass(frozen=True)
class Sizes:
    """Tokens of all rows together, and the width and the inner size of a layer."""

    tokens: int
    width: int
    hidden: int

    def model(self, moe: MoEConfig | None = None) -> ModelConfig:
        return ModelConfig(
            width=self.width, ffn_hidden=self.hidden, heads=1, moe=moe or MoEConfig()
        )


def dense(sizes: Sizes) -> tuple[nn.Module, Layer]:
    layer = SwiGLU(sizes.model())
    return layer, lambda x: (layer(x).output,)


def ours(sizes: Sizes, moe: MoEConfig) -> tuple[nn.Module, Layer]:
    """Every row is an image half and a text half."""
    layer = MoE(sizes.model(moe))
    length = sizes.tokens // ROWS
    modality = torch.full((ROWS, length), int(Modality.text))
    modality[:, : length // 2] = int(Modality.image)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        fed = layer(x, modality)
        assert fed.auxiliary is not None
        return (fed.output, fed.auxiliary) if fed.auxiliary.requires_grad else (fed.output,)

    return layer, run


def experts_alone(sizes: Sizes, moe: MoEConfig, *, even: bool) -> tuple[nn.Module, Layer]:
    layer = Experts(sizes.model(moe))
    loads = torch.full((EXPERTS,), sizes.tokens // EXPERTS)
    if not even:
        loads = torch.randn(sizes.tokens, EXPERTS).argmax(dim=1).bincount(minlength=EXPERTS)
    ends = loads.cumsum(0).int()
    return layer, lambda x: (layer(x.flatten(0, 1), ends).view_as(x),)


def mixtral(sizes: Sizes) -> tuple[nn.Module, Layer]:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        experts_implementation="grouped_mm",  # pyright: ignore[reportCallIssue]
    )
    layer = MixtralSparseMoeBlock(config)
    return layer, lambda x: (layer(x),)


def deepspeed_layer(sizes: Sizes) -> tuple[nn.Module, Layer]:
    """It wants a group of processes; there is one.

    That nmm.inside_deepspeed was imported before keeps it from compiling what nobody needs.
    """
    import deepspeed
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = SwiGLU(sizes.model())

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(x).output

    parallel.start()
    deepspeed.init_distributed(dist_init_required=False)
    layer = DeepSpeedMoE(sizes.width, Expert(), num_experts=EXPERTS)
    layer.set_deepspeed_parallelism()
    return layer, lambda x: layer(x)[:2]


def contenders(sizes: Sizes) -> dict[str, tuple[nn.Module, Layer]]:
    halves = ExpertGroups(text=EXPERTS // 2, image=EXPERTS // 2)
    choice = MoEConfig(Routing.token_choice, experts=EXPERTS)
    return {
        "dense": dense(sizes),
        "token choice": ours(sizes, choice),
        "modality groups": ours(sizes, MoEConfig(Routing.modality_groups, groups=halves)),
        "expert choice": ours(sizes, MoEConfig(Routing.expert_choice, groups=halves)),
        "experts alone": experts_alone(sizes, choice, even=False),
        "experts alone, even loads": experts_alone(sizes, choice, even=True),
        "Mixtral's block": mixtral(sizes),
        f"DeepSpeed {DEEPSPEED_VERSION}'s layer": deepspeed_layer(sizes),
    }


def work(layer: nn.Module, run: Layer, *, sizes: Sizes, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward with random weights of the usual size."""
    layer.to(dtype)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.02)
    shape = (ROWS, sizes.tokens // ROWS, sizes.width)
    x, upstream = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape).to(dtype)
    leaves = [x, *layer.parameters()]

    def once() -> object:
        output, *losses = run(x)
        return torch.autograd.grad(
            [output, *losses], leaves, [upstream, *map(torch.ones_like, losses)]
        )

    return once


@dataclass(frozen=True)
class Times:
    """Seconds of every round: of the clock, and of the processor in all threads."""

    clock: list[float]
    processor: list[float]


def measure(works: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, Times]:
    """After one round that does not count."""
    times = {name: Times([], []) for name in works}
    names = list(works)
    for number in range(-1, rounds):
        turned = number % len(names)
        for name in names[turned:] + names[:turned]:
            before = time.perf_counter(), time.process_time()
            works[name]()
            if number >= 0:
                times[name].clock.append(time.perf_counter() - before[0])
                times[name].processor.append(time.process_time() - before[1])
    return times


def ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(mine, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.moe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(%(default)s)")
    for name, default in (("tokens", 4096), ("width", 512), ("hidden", 1408), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = Sizes(options.tokens, options.width, options.hidden)
    works = {
        name: work(*made, sizes=sizes, dtype=DTYPES[options.dtype])
        for name, made in contenders(sizes).items()
    }
    times = measure(works, rounds=options.rounds)
    print(
        f"{options.dtype}, {sizes.tokens:,} tokens, width {sizes.width}, inner size "
        f"{sizes.hidden}, {torch.get_num_threads()} threads, {options.rounds} rounds"
    )
    print("| layer | ms | times dense | ms of processors | times dense |\n|---|---|---|---|---|")
    for name, mine in times.items():
        cells = []
        for seconds, least in (
            (mine.clock, times["dense"].clock),
            (mine.processor, times["dense"].processor),
        ):
            cells += [f"{statistics.median(seconds) * 1e3:.1f}", f"{ratio(seconds, least):.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
