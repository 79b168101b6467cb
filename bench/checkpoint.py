"""Our checkpoints against DeepSpeed's, its fast and decoupled engines, and torch's DCP.

    python -m bench.checkpoint [--processes 1 2] [--width 512] [--depth 8] [--rounds 9]

One model of ZeRO 1 on one engine in every process, whose tensors all ways write and take back. The
*stall* is how long training waits for a save; ways that write beside it are waited for after that
(*until complete*). Ours is the whole save of a run: room, checksums, marker, and in a row of its
own the removal of the one before; its resume reads all files once more, for the checksums. DCP
gets the flat tensors of each process under names of their own, so that its files go on in the same
shape only. Ways take turns in every round; a ratio is the median over rounds of a way's time
divided by ours in the same round. A way that does not run is named with its reason. Needs room for
one checkpoint of every way.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.utils._pytree import tree_map

from nmm import checkpoint, intact, sums
from nmm.checkpoint import Progress
from nmm.config import CheckpointConfig, EngineConfig, ImageConfig, ModelConfig, OptimConfig
from nmm.engine import Engine, split_step
from nmm.model import build
from nmm.parallel import World, barrier
from nmm.shares import held
from tests.batches import pack
from tests.forked import together

ROWS, ROW_TOKENS = 4, 256
# Its default (none) asks for a rank that DeepSpeed's own description of the processes lacks.
SPREAD = {"data_parallel": "replica"}
STEPS_BETWEEN_SAVES = CheckpointConfig().every_steps
T = TypeVar("T")
Wait = Callable[[], object]  # until what was begun is complete


def nothing() -> None:
    """All was complete when the save returned."""


REMOVING = "ours, removing the one before"
COLUMNS = (
    "way",
    "MiB",
    "stall s",
    "it / ours",
    "of an interval",
    "until complete s",
    "resume s",
    "it / ours",
)


@dataclass
class Way:
    """One way to save into a folder and to take it back; its times, and why it does not run."""

    name: str
    save: Callable[[Path], Wait]
    load: Callable[[Path], object]
    prepare: Callable[[], None] = nothing
    stalls: list[float] = field(default_factory=list)
    completes: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    num_bytes: int = 0


class Writers:
    """Lets a DeepSpeed engine write in other ways; a process beside it is started once."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._made = {"": (inner.checkpoint_engine, inner.save_non_zero_checkpoint)}

    def use(self, options: dict) -> None:
        """Those of DeepSpeed's `checkpoint.writer`; with none, its plain engine."""
        inner, key = self._inner, json.dumps(options) if options else ""
        if key not in self._made:
            inner._config.checkpoint_config = get_checkpoint_config(
                {"checkpoint": {"writer": options}}
            )
            with contextlib.redirect_stdout(io.StringIO()):
                inner._configure_checkpointing()
            engine = inner.checkpoint_engine
            if engine.is_decoupled():
                # What it is given requires gradients, and torch sends no such tensor to others.
                send = engine.save
                engine.save = lambda state_dict, path: send(detached(state_dict), path)
            self._made[key] = (engine, inner.save_non_zero_checkpoint)
        inner.checkpoint_engine, inner.save_non_zero_checkpoint = self._made[key]

    def close(self) -> None:
        self.use({})
        for engine, _ in self._made.values():
            if engine.is_decoupled():
                engine.cleanup()


def detached(state: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, state)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="after one that is not counted")
    options = parser.parse_args()
    os.environ |= {"CROSS_RANK": "0", "CROSS_SIZE": "1"}  # DeepSpeed's writers: this machine of one
    with tempfile.TemporaryDirectory(prefix="nmm-checkpoint-") as folder:
        for processes in (0, *options.processes):  # 0: alone, what runs at all
            work = partial(measure, options=options, folder=Path(folder), probes=not processes)
            together(work, processes=processes or 1)


def measure(world: World, *, options: argparse.Namespace, folder: Path, probes: bool) -> None:
    """All ways in turn, in every round; the main process prints."""
    torch.set_num_threads(1)
    engine, step_seconds = trained(options, world=world)
    writers, faults = Writers(engine.model), folder / "faults.json"
    ways = all_ways(engine, writers, world=world)
    if probes:
        found = {way.name: fault_of(way, folder / way.name) for way in ways}
        faults.write_text(json.dumps(found))
        writers.close()
        return
    found = json.loads(faults.read_text())
    running = [way for way in ways if not found[way.name]]
    for _ in range(1 + options.rounds):
        for place, way in enumerate(running):
            turn(way, folder / f"{world.size}-{place}", world=world)
    writers.close()
    if world.is_main:
        tell(ways, faults=found, step_seconds=step_seconds, processes=world.size)


def trained(options: argparse.Namespace, *, world: World) -> tuple[Engine, float]:
    """An engine whose optimizer has made steps, and the seconds of the last one."""
    image = ImageConfig(side_pixels=64, patch_pixels=8)
    model = ModelConfig(width=options.width, depth=options.depth, heads=8, image=image)
    split = split_step(ROWS, micro_batch=1, world_size=world.size)
    engine = Engine(
        build(model, seed=0),
        config=EngineConfig(zero_stage=1, micro_batch=1),
        optim=OptimConfig(),
        split=split,
        num_sources=1,
        world=world,
        seed=0,
    )
    batch = pack([[(ROW_TOKENS,)]], config=model, row_tokens=ROW_TOKENS)
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        engine.train_step([batch] * split.accumulation_steps, learning_rate=1e-4)
    return engine, time.perf_counter() - started


def all_ways(engine: Engine, writers: Writers, *, world: World) -> list[Way]:
    """Ours first."""
    inner: Any = engine.model
    step: list[int] = [0]
    others: Any = dist.new_group()  # DCP writes beside, with collectives of its own
    flat = flat_tensors(engine, world=world)

    def ours(directory: Path, *, keep_last: int) -> Wait:
        step[0] += 1
        config = CheckpointConfig(keep_last=keep_last)
        progress = Progress(step=step[0])
        checkpoint.save(engine, progress, directory=directory, config=config, world=world)
        return nothing

    def load_ours(directory: Path) -> None:
        found = intact.newest_intact(directory, world=world).checkpoint
        assert found
        engine.load(found)

    def deepspeed(directory: Path) -> Wait:
        inner.save_checkpoint(directory)
        decoupled = inner.checkpoint_engine.is_decoupled()
        return inner._commit_decoupled_checkpoint if decoupled else nothing

    def summed(directory: Path) -> Wait:
        wait = deepspeed(directory)

        def complete() -> None:
            wait()
            barrier()
            mine = sorted(filter(Path.is_file, directory.rglob("*")))[world.rank :: world.size]
            for path in mine:  # as is done before a load; what is found does not matter here
                sums.fault_of(path, expected=sums.Sum(path.stat().st_size, 0))

        return complete

    def load_deepspeed(directory: Path) -> None:
        writers.use({})  # its fast engine's own reader refuses what DeepSpeed wrote
        assert inner.load_checkpoint(directory)[0] is not None

    def plain(directory: Path, *, sync: bool) -> Wait:
        save(flat, storage_writer=FileSystemWriter(directory, sync_files=sync))
        return nothing

    def beside(directory: Path) -> Wait:
        writer = FileSystemWriter(directory, sync_files=False)
        begun: Any = async_save(flat, storage_writer=writer, process_group=others)
        return begun.result

    def load_dcp(directory: Path) -> None:
        load(flat, checkpoint_id=directory)

    kinds: dict[str, dict] = {
        "DeepSpeed": {},
        "DeepSpeed, fast engine, writer `python`": {"type": "python", **SPREAD},
        "DeepSpeed, fast engine, writer `fast`": {"type": "fast", **SPREAD},
        "DeepSpeed, decoupled engine": {"type": "python", "decoupled": True, **SPREAD},
    }
    return [
        Way("ours", partial(ours, keep_last=2), load_ours),
        Way(REMOVING, partial(ours, keep_last=1), load_ours),
        *(
            Way(name, deepspeed, load_deepspeed, partial(writers.use, options))
            for name, options in kinds.items()
        ),
        Way(
            "DeepSpeed, decoupled engine, sums read back",
            summed,
            load_deepspeed,
            partial(writers.use, kinds["DeepSpeed, decoupled engine"]),
        ),
        Way("DCP `save`, synced (its default)", partial(plain, sync=True), load_dcp),
        Way("DCP `save`, not synced", partial(plain, sync=False), load_dcp),
        Way("DCP `async_save`, not synced", beside, load_dcp),
    ]


def flat_tensors(engine: Engine, *, world: World) -> dict[str, torch.Tensor]:
    """What our own files hold, as they lie in the engine's memory."""
    shares = [each.share() for each in held(engine.model, world=world) if each.writes]
    return {
        f"{world.rank}/{number}/{kind}": tensor
        for number, share in enumerate(shares)
        for kind, tensor in share.tensors.items()
    }


def turn(way: Way, directory: Path, *, world: World) -> None:
    """One save and one load."""
    way.prepare()
    if way.name != REMOVING and world.is_main:
        shutil.rmtree(directory, ignore_errors=True)
    stall, wait = clocked(lambda: way.save(directory))
    rest, _ = clocked(wait)
    way.stalls.append(stall)
    way.completes.append(stall + rest)
    way.loads.append(clocked(lambda: way.load(directory))[0])
    way.num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def fault_of(way: Way, directory: Path) -> str | None:
    """Why it does not run, if it does not."""
    try:
        way.prepare()
        way.save(directory)()
        way.load(directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def clocked(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds until every process has done it."""
    barrier()
    started = time.perf_counter()
    done = work()
    barrier()
    return time.perf_counter() - started, done


def tell(
    ways: list[Way], *, faults: dict[str, str | None], step_seconds: float, processes: int
) -> None:
    """The first round, in which much is made for the first time, is not counted."""
    ours, interval = ways[0], STEPS_BETWEEN_SAVES * step_seconds
    print(
        f"\nprocesses: {processes}, medians of {len(ours.stalls) - 1} rounds; a step of "
        f"{ROWS * ROW_TOKENS:,} tokens takes {step_seconds:.2f} s, an interval of "
        f"{STEPS_BETWEEN_SAVES:,} steps {interval:,.0f} s\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for way in ways:
        if faults[way.name]:
            print(f"| {way.name} | does not run: {faults[way.name]} |")
            continue
        stall = median(way.stalls[1:])
        print(
            f"| {way.name} | {way.num_bytes / 2**20:.0f} | {stall:.3f} | "
            f"{ratio(way.stalls, ours.stalls)} | {stall / interval:.4%} | "
            f"{median(way.completes[1:]):.3f} | {median(way.loads[1:]):.3f} | "
            f"{ratio(way.loads, ours.loads)} |"
        )


def ratio(times: list[float], ours: list[float]) -> str:
    """The median of the rounds' own ratios, with the least and the greatest."""
    ratios = [its / our for its, our in zip(times[1:], ours[1:], strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
