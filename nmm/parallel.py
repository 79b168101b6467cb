"""Processes: who am I, and the few collectives that are not the engine's."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from nmm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all. `size` 1 needs no launcher."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> World:
    """Join the process group: nccl on GPUs, gloo on CPUs; a lone process opens no port."""
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
    # The class is public and documented; its name is missing from the module's exports.
    store = dist.HashStore() if size == 1 else None  # pyright: ignore[reportPrivateImportUsage]
    # DeepSpeed's own default changed from 30 to 10 minutes between releases, so the limit is ours.
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if cuda and size > 1 else None,
        timeout=timedelta(minutes=30),
    )
    return World(rank=rank, size=size, device=device)


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


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every process."""
    dist.barrier()
