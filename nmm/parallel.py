"""Processes: who am I, and the few collectives that are not the engine's."""

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# Public and documented; their names are missing from the module's exports.
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # pyright: ignore

from nmm.errors import UserError

T = TypeVar("T")


class Unwritten(Exception):  # noqa: N818 - the run goes on
    """Files could not be written, and all processes know; the message says whose and why."""


@dataclass(frozen=True)
class World:
    """This process among all; `size` 1 needs no launcher. All read and write the `store`."""

    rank: int
    size: int
    device: torch.device
    store: Store

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def peak_memory_bytes(world: World) -> int:
    """The most that this process has held: tensors on its GPU, or all of it in main memory."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB


# NCCL ends the process when a collective takes too long; nmm/fault.py speaks before that.
NCCL_PATIENCE = 1.5
# At the start, for the last to come: all read the same libraries, from a disk that may be slow.
MINUTES_TO_MEET = 10.0


def start(*, timeout_minutes: float = 30) -> World:
    """Join the process group: nccl on GPUs, gloo on CPUs; a lone process opens no port.

    A collective that takes longer than `timeout_minutes` is an error. Until all have met they wait
    MINUTES_TO_MEET at least.
    """
    size, rank, local_rank = (
        int(os.environ.get(key, default))
        for key, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads it
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS is {tasks} but WORLD_SIZE is not set, so each task would train "
            f"alone; let srun start one torchrun per node."
        )
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local_rank} but this machine has {torch.cuda.device_count()} GPUs; "
            f"start one process per GPU."
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = _limit(max(timeout_minutes, MINUTES_TO_MEET))
    if size == 1:
        store = HashStore()
    else:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps the store when it starts again, with the addresses of the dead.
            store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    try:
        # DeepSpeed's default changed from 30 to 10 minutes between releases, so the limit is ours.
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            device_id=device if cuda and size > 1 else None,
            timeout=timeout,
        )
    except RuntimeError as error:
        raise UserError(
            f"process {rank} of {size} cannot reach the others ({reason(error)}); see that all "
            f"machines are up, and name their common network interface in "
            f"{'NCCL' if cuda else 'GLOO'}_SOCKET_IFNAME."
        ) from None
    store.set_timeout(_limit(timeout_minutes))
    limit_waiting(timeout_minutes)
    store.set(f"nmm/host of {rank}", socket.gethostname())
    return World(rank=rank, size=size, device=device, store=store)


def limit_waiting(timeout_minutes: float) -> None:
    """Give the groups that other libraries made the limit of ours.

    They have torch's own, 10 minutes with NCCL and 30 with gloo, and torch has no public way.
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(_limit(timeout_minutes), group)


def _limit(timeout_minutes: float) -> timedelta:
    return timedelta(minutes=timeout_minutes * (NCCL_PATIENCE if torch.cuda.is_available() else 1))


def stop() -> None:
    """Leave the process group.

    NOTE: gloo's worker thread drops the Python objects of the last collective and needs the GIL for
    it. If the interpreter begins to shut down first, that thread is killed and the process aborts
    with "terminate called without an active exception" (6 of 24 exits with ZeRO 0). Sleeping hands
    it the GIL.
    """
    if dist.is_initialized():
        time.sleep(0.1)
        dist.destroy_process_group()


def add_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all processes, in place."""
    dist.all_reduce(tensor)
    return tensor


def gather_lists(items: Sequence[T]) -> list[T]:
    """The items of all processes in rank order; every process gets them."""
    parts: list[Sequence[T]] = [()] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def agreed(work: Callable[[], T], *, world: World) -> T:
    """The result of `work`, if every process could do it; else the first error, on every process.

    A shard can be missing on one machine only, and the others must not wait for it.
    """
    done, errors = [], []
    try:
        done.append(work())
    except UserError as error:
        errors.append(f"{error}" if world.is_main else f"{error} (process {world.rank})")
    errors = gather_lists(errors)
    if errors:
        raise UserError(errors[0])
    return done[0]


@contextmanager
def naming_process(world: World) -> Iterator[None]:
    """What only one process meets should say which."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (process {world.rank})") from None


@contextmanager
def writing_together() -> Iterator[None]:
    """An OSError of any process becomes Unwritten on all; all of them pass here together."""
    faults: list[str] = []
    try:
        yield
    except OSError as error:
        faults.append(f"{error} (process {dist.get_rank()})")
    if faults := gather_lists(faults):
        raise Unwritten(faults[0])


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def copy_from_main(tensor: torch.Tensor, *, world: World) -> None:
    """Put the main process's numbers into a tensor of every process, wherever it lies."""
    on_device = tensor.to(world.device)
    dist.broadcast(on_device, src=0)
    tensor.copy_(on_device)


def barrier() -> None:
    """Wait for every process."""
    dist.barrier()


def is_of_a_collective(error: Exception) -> bool:
    """Is it about other processes? gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in f"{error}".lower()


def reason(error: Exception) -> str:
    """What gloo or NCCL say, without the place in their code and advice for programmers."""
    first = f"{error}".strip().partition("\n")[0]
    return first.partition(". This is")[0].rpartition(".cc:")[2].partition("] ")[2] or first
