"""The attention backends against each other, on rows of packed documents.

    python -m bench.attention [--device cuda] [--dtype bf16] [--row-tokens 4096] [--rounds 9]

Times one layer's attention (queries, keys and values are given), forward alone and forward with
backward, and the plan that all layers share. Every round times every backend once, one after the
other; a ratio is the median over rounds of a backend's time divided by the time of `mask` in the
same round. On CPUs `flex` has no backward and is not compiled.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nmm.batch import PackedBatch
from nmm.config import AttentionBackend, ImageAttention
from nmm.model.plan import Plan, plan

BACKENDS = (AttentionBackend.mask, AttentionBackend.documents, AttentionBackend.flex)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGE_TOKENS = 256
# Documents as (image tokens, text tokens), repeated until a row is full.
KINDS = {
    "captions": [(IMAGE_TOKENS, 40)],
    "texts of 1,024": [(0, 1024)],
    "texts of 100": [(0, 100)],
    "captions and texts": [(IMAGE_TOKENS, 40), (0, 600)],
}


@dataclass(frozen=True)
class Case:
    """What is attended: rows of documents, and random queries, keys and values."""

    batch: PackedBatch
    qkv: tuple[Tensor, Tensor, Tensor]

    def plan(self, backend: AttentionBackend) -> Plan:
        return plan(
            self.batch,
            backend=backend,
            image_attention=ImageAttention.block,
            dtype=self.qkv[0].dtype,
        )


def packed(documents: list[tuple[int, int]], *, rows: int, row_tokens: int) -> PackedBatch:
    """Rows of these documents, the last of each row cut where the row ends."""
    document, image = (torch.zeros(rows, row_tokens, dtype=torch.int32) for _ in range(2))
    at = number = 0
    while at < row_tokens:
        images, texts = documents[number % len(documents)]
        number += 1
        document[:, at : at + 1 + images + texts] = number
        image[:, at + 1 : at + 1 + images] = number if images else 0
        at += 1 + images + texts
    empty = torch.zeros(rows, row_tokens, dtype=torch.int64)
    return PackedBatch(
        tokens=empty,
        modality=empty,
        source=empty,
        document=document,
        image=image,
        position=empty,
        labels=empty,
        label_modality=empty,
        pixels=empty,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="rows at a time (%(default)s)")
    parser.add_argument("--row-tokens", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--head-channels", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    print(
        f"{device}, {options.dtype}, {options.rows} rows of {options.row_tokens:,} tokens, "
        f"{options.heads} heads of {options.head_channels} channels; "
        f"ms, and in brackets the ratio to mask"
    )
    print("| documents | what |" + "".join(f" {backend.name} |" for backend in BACKENDS))
    print("|---|---|" + "---|" * len(BACKENDS))
    shape = (options.rows, options.row_tokens, options.heads, options.head_channels)
    for kind, documents in KINDS.items():
        batch = packed(documents, rows=options.rows, row_tokens=options.row_tokens).to(device)
        q, k, v = (torch.randn(shape, dtype=DTYPES[options.dtype], device=device) for _ in "qkv")
        case = Case(batch, (q, k, v))
        for what, work in WORKS.items():
            times = measure(case, work, rounds=options.rounds)
            print(f"| {kind} | {what} |" + "".join(f" {cell(times, b)} |" for b in BACKENDS))


Work = Callable[[Case, AttentionBackend], Callable[[], object] | None]


def planning(case: Case, backend: AttentionBackend) -> Callable[[], object]:
    return lambda: case.plan(backend)


def forward(case: Case, backend: AttentionBackend) -> Callable[[], object]:
    made = case.plan(backend)

    def run() -> object:
        with torch.no_grad():
            return made.attend(*case.qkv)

    return run


def training(case: Case, backend: AttentionBackend) -> Callable[[], object] | None:
    """Forward and backward; None where there is no backward."""
    if backend is AttentionBackend.flex and not case.qkv[0].is_cuda:
        return None
    made, leaves = case.plan(backend), [x.clone().requires_grad_() for x in case.qkv]
    upstream = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(made.attend(*leaves), leaves, upstream)


WORKS: dict[str, Work] = {
    "plan": planning,
    "forward": forward,
    "forward and backward": training,
}


def measure(case: Case, work: Work, *, rounds: int) -> dict[AttentionBackend, list[float]]:
    """Milliseconds of every round, by backend; those without this work are left out."""
    runs = {backend: work(case, backend) for backend in BACKENDS}
    able = {backend: run for backend, run in runs.items() if run is not None}
    for run in able.values():
        seconds(run, device=case.batch.document.device)  # kernels are compiled here
    times: dict[AttentionBackend, list[float]] = {backend: [] for backend in able}
    for _ in range(rounds):
        for backend, run in able.items():
            times[backend].append(1000 * seconds(run, device=case.batch.document.device))
    return times


def seconds(run: Callable[[], object], *, device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def cell(times: dict[AttentionBackend, list[float]], backend: AttentionBackend) -> str:
    if backend not in times:
        return "-"
    pairs = zip(times[backend], times[AttentionBackend.mask], strict=True)
    ratio = statistics.median(mine / mask for mine, mask in pairs)
    return f"{statistics.median(times[backend]):.2f} ({ratio:.2f})"


if __name__ == "__main__":
    main()
