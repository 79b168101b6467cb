"""A layer's experts divided over all processes, against whole ones on each of them.

    torchrun --nproc_per_node 2 -m bench.expert_parallel [--tokens 2048] [--rounds 15]

Forward and backward of one layer of 8 experts that take a token each (width 512, inner size 1,408),
in fp32 and bf16, every process with tokens of its own. Both take turns within a round, in changing
order, and the slowest process counts; a ratio is the median over rounds. In further rounds all
processes meet before every exchange of rows, so that waiting for one another and the exchange
itself are told apart. Whole experts have gradients to add up among processes, once for every step
of an optimizer; that time stands alone. One thread in each process.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from nmm import parallel
from nmm.batch import Modality
from nmm.config import ModelConfig, MoEConfig, Routing
from nmm.expert_parallel import Elsewhere, divide_experts
from nmm.model import build
from nmm.model.layers import Fed
from nmm.model.moe import MoE
from nmm.parallel import World

ROW_TOKENS = 512
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG = ModelConfig(
    width=512,
    depth=1,
    heads=8,
    vocab_size=512,
    moe=MoEConfig(Routing.token_choice, experts=8, hidden=1408),
)
COLUMNS = (
    *("precision", "whole ms", "divided ms", "divided / whole", "of it exchange, fraction"),
    *(
        "waiting, fraction",
        "MB, own rows too",
        "whole: adding gradients ms",
        "divided / whole, with it",
    ),
)


@dataclass
class Exchanged:
    """What one process spent in exchanges: seconds until all were there, seconds of moving."""

    waiting: float = 0.0
    moving: float = 0.0
    num_bytes: int = 0


def layer(dtype: torch.dtype, *, world: World, divided: bool) -> MoE:
    """The layer of experts of a model of one block."""
    model = build(CONFIG, seed=0).to(world.device, dtype)
    if divided:
        divide_experts(model, parts=world.size, rank=world.rank)
    found = model.get_submodule("blocks.0.ffn")
    assert isinstance(found, MoE)
    if divided:
        assert isinstance(found.elsewhere, Elsewhere)
        found.elsewhere.to(world.device)
        found.elsewhere.ep_group = dist.group.WORLD
    return found


@dataclass(frozen=True)
class Work:
    """Tokens of this process, and the gradient of what a layer makes of them."""

    x: Tensor
    upstream: Tensor
    modality: Tensor

    def run(self, module: MoE) -> Tensor:
        """Forward and backward, as far as to the input; returns the output."""
        fed: Fed = module(self.x, self.modality)
        assert fed.auxiliary is not None
        upstream = [self.upstream, torch.ones_like(fed.auxiliary)]
        inputs = [self.x, *module.parameters()]
        torch.autograd.grad([fed.output, fed.auxiliary], inputs, upstream)
        return fed.output


def work(dtype: torch.dtype, *, tokens: int, world: World) -> Work:
    draw = torch.Generator().manual_seed(world.rank)
    shape = (tokens // ROW_TOKENS, ROW_TOKENS, CONFIG.width)
    x, upstream = (torch.randn(shape, generator=draw).to(world.device, dtype) for _ in range(2))
    modality = torch.full(shape[:2], int(Modality.text), device=world.device)
    return Work(x.requires_grad_(), upstream, modality)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], object], *, world: World) -> float:
    """Of the slowest process, when all begin together."""
    parallel.barrier()
    started = now(world.device)
    run()
    spent = torch.tensor(now(world.device) - started, device=world.device)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.item()


@contextmanager
def watching(device: torch.device) -> Iterator[Exchanged]:
    """All processes meet before every exchange of rows."""
    found, exchange = Exchanged(), dist.all_to_all_single

    def timed(output: Tensor, given: Tensor, **others: object) -> None:
        started = now(device)
        parallel.barrier()
        met = now(device)
        exchange(output, given, **others)  # pyright: ignore[reportArgumentType]
        found.waiting += met - started
        found.moving += now(device) - met
        found.num_bytes += given.nbytes

    with patch.object(dist, "all_to_all_single", timed):
        yield found


def add_up(gradients: list[Tensor]) -> None:
    for gradient in gradients:
        dist.all_reduce(gradient)


def row(precision: str, *, tokens: int, rounds: int, world: World) -> list[str]:
    """The cells of one line."""
    dtype = PRECISIONS[precision]
    given = work(dtype, tokens=tokens, world=world)
    layers = [layer(dtype, world=world, divided=divided) for divided in (False, True)]
    whole, divided = (given.run(module) for module in layers)
    assert torch.allclose(whole, divided, rtol=0, atol=2e-5 if dtype == torch.float32 else 2e-2)
    times: list[list[float]] = [[], [], []]
    gradients = [torch.zeros_like(weight) for weight in layers[0].experts.parameters()]
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(seconds(lambda m=layers[which]: given.run(m), world=world))
        times[2].append(seconds(lambda: add_up(gradients), world=world))
    spent, exchanged = [], []
    for _ in range(rounds):
        with watching(world.device) as found:
            spent.append(seconds(lambda: given.run(layers[1]), world=world))
        exchanged.append(found)
    pairs = list(zip(*times, strict=True))
    shares = [
        statistics.median(
            getattr(one, name) / all_ for one, all_ in zip(exchanged, spent, strict=True)
        )
        for name in ("moving", "waiting")
    ]
    milliseconds = [1000 * statistics.median(column) for column in times]
    return [
        precision,
        *(f"{one:.1f}" for one in milliseconds[:2]),
        f"{statistics.median(d / w for w, d, _ in pairs):.2f}",
        *(f"{share:.3f}" for share in shares),
        f"{exchanged[0].num_bytes / 1e6:.1f}",
        f"{milliseconds[2]:.1f}",
        f"{statistics.median(d / (w + a) for w, d, a in pairs):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.expert_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of a process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        sys.exit("error: start it with torchrun --nproc_per_node 2 -m bench.expert_parallel")
    torch.set_num_threads(1)
    world = parallel.start()
    for number, precision in enumerate(PRECISIONS):
        cells = row(precision, tokens=options.tokens, rounds=options.rounds, world=world)
        if world.is_main and number == 0:
            print(f"{world.size} processes, {options.tokens:,} tokens each, {world.device}")
            print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        if world.is_main:
            print(f"| {' | '.join(cells)} |", flush=True)
    parallel.stop()


if __name__ == "__main__":
    main()
