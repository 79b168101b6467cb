"""A batch as one block of memory, so that a worker process hands over one thing and not nine.

Every tensor that crosses processes costs about 0.2 ms, for a file descriptor and a connection;
a batch of one row is built in 10 ms.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from nmm.batch import Dropped, PackedBatch


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


def tensors(parts: list[Part]) -> dict[str, Tensor]:
    """Uninitialised tensors in one new block, which is shared memory in a worker process.

    Wider types come first, or the later ones would not be aligned.
    """
    size = sum(_bytes(part) for part in parts)
    storage = torch.UntypedStorage
    shared = get_worker_info() is not None
    # NOTE: as torch's own collate does; Tensor.share_memory_ would copy what is not yet there.
    memory = storage._new_shared(size) if shared else storage(size)
    return _views(torch.empty(0, dtype=torch.uint8).set_(memory), parts)


def pack(batch: PackedBatch) -> Parcel:
    """The batch whose tensors `tensors` made."""
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
    return PackedBatch(
        **_views(parcel.block, parcel.parts),
        keys=parcel.keys,
        dropped=parcel.dropped,
        counts=parcel.counts,
    )


def _views(block: Tensor, parts: list[Part]) -> dict[str, Tensor]:
    views, stop = {}, 0
    for part in parts:
        start, stop = stop, stop + _bytes(part)
        views[part.name] = block[start:stop].view(part.dtype).view(part.shape)
    return views


def _bytes(part: Part) -> int:
    return math.prod(part.shape) * part.dtype.itemsize
