"""A batch as one block of memory, so that a worker process hands over one thing and not nine.

Every tensor that crosses processes costs about 0.2 ms, for a file descriptor and a connection;
a batch of one row is built in 10 ms. And memory that is new costs the kernel 0.3 ms per MB, for
every page of it: a block is used again when its batch is gone.
"""

import math
import os
import weakref
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from nmm.batch import Dropped, PackedBatch

FREE, LENT = 0, 1
MARK_BYTES = 64  # what is behind the mark stays aligned


class Part(NamedTuple):
    """A tensor in a block."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parcel:
    """A batch on its way between processes: `parts` lie in `block` one behind the other."""

    block: Tensor
    parts: list[Part]
    keys: list[list[str]]
    dropped: list[Dropped]
    counts: dict[str, int]


class Blocks:
    """The blocks of one process, which makes a new one only while all others hold batches.

    A block begins with a mark that says whether it is lent. It is set here, and removed by the
    process that has unpacked the batch, when the last tensor of that batch is gone.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def tensors(self, parts: list[Part]) -> dict[str, Tensor]:
        """Uninitialised tensors in one block, which is shared memory in a worker process.

        Wider types come first, or the later ones would not be aligned.
        """
        block = self._take(MARK_BYTES + sum(_bytes(part) for part in parts))
        _mark(block)[0] = LENT
        return _views(block, parts)

    def _take(self, size: int) -> Tensor:
        free = [place for place, block in enumerate(self._blocks) if _mark(block)[0] != LENT]
        for place in free:
            if len(self._blocks[place]) >= size:
                return self._blocks[place]
        if free:  # all too small: a larger one takes the place of one
            del self._blocks[free[0]]
        self._blocks.append(_new(size))
        return self._blocks[-1]


def _new(size: int) -> Tensor:
    storage = torch.UntypedStorage
    shared = get_worker_info() is not None
    # NOTE: as torch's own collate does; Tensor.share_memory_ would copy what is not yet there.
    memory = storage._new_shared(size) if shared else storage(size)
    return torch.empty(0, dtype=torch.uint8).set_(memory)


def pack(batch: PackedBatch) -> Parcel:
    """The batch whose tensors `Blocks` made."""
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    parts = [
        Part(name, value.dtype, tuple(value.shape))
        for name, value in found.items()
        if isinstance(value, Tensor)
    ]
    parts.sort(key=lambda part: found[part.name].storage_offset() * part.dtype.itemsize)
    blocks = {found[part.name].untyped_storage().data_ptr() for part in parts}
    assert len(blocks) == 1, "the tensors lie in several blocks"
    block = torch.empty(0, dtype=torch.uint8).set_(batch.tokens.untyped_storage())
    return Parcel(block, parts, batch.keys, batch.dropped, batch.counts)


def unpack(parcel: Parcel) -> PackedBatch:
    """The batch, whose block may be used again when its last tensor is gone."""
    held = parcel.block.numpy()  # by the tensors made of it, and by nothing else
    weakref.finalize(held, _give_back, _mark(parcel.block), os.getpid()).atexit = False
    return PackedBatch(
        **_views(torch.from_numpy(held), parcel.parts),
        keys=parcel.keys,
        dropped=parcel.dropped,
        counts=parcel.counts,
    )


def _give_back(mark: np.ndarray, lender: int) -> None:
    """Not in a process that was forked with the batch, which may let go of it much earlier."""
    if os.getpid() == lender:
        mark[0] = FREE


def _mark(block: Tensor) -> np.ndarray:
    """uint8[1]: not as a tensor, because one of `torch.inference_mode` is not written elsewhere."""
    return block.numpy()[:1]


def _views(block: Tensor, parts: list[Part]) -> dict[str, Tensor]:
    views, stop = {}, MARK_BYTES
    for part in parts:
        start, stop = stop, stop + _bytes(part)
        views[part.name] = block[start:stop].view(part.dtype).view(part.shape)
    return views


def _bytes(part: Part) -> int:
    return math.prod(part.shape) * part.dtype.itemsize
