"""Weights and optimizer state in files that say which numbers they hold, not who holds them.

Every process writes one file of flat tensors. A piece is a stretch of one parameter in one of them:
    a parameter, flattened          [ 0 1 2 3 4 5 | 6 7 8 9 ]
    in flat tensor 2 of process 0   [ .. 0 1 2 3 4 5 ]              (start 0, offset 2)
    in flat tensor 2 of process 1   [ 6 7 8 9 .. .. ..  ]           (start 6, offset 0)
All kinds of numbers of a parameter (its weight, each moment of the optimizer) lie alike. So a
process of any other shape of run finds what it needs by name and range, and reads nothing else.

    pieces.json        step, updates, kinds, shapes of the parameters, the pieces of every file
    states_00003.pt    "2/weight", "2/exp_avg", ...: the flat tensors of process 3
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmm.sums import Sum, summing, write_text

WEIGHT = "weight"  # the kind that every parameter has; the others are torch's names of its state
PIECES = "pieces.json"


@dataclass(frozen=True)
class Piece:
    """`numel` elements of parameter `name` from `start` on, which lie at `offset` in a tensor."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Share:
    """A flat tensor of every kind, and the pieces that lie in them; what is between is padding."""

    tensors: dict[str, Tensor]
    pieces: list[Piece]


@dataclass(frozen=True)
class Written:
    """What a checkpoint tells of itself.

    The optimizer made `updates` in `step` steps, and keeps a flat tensor of each of `kinds`;
    `shapes` are those of the whole parameters. `files` holds for every process the pieces of each
    of its flat tensors. `processes` and `zero_stage` are for people.
    """

    step: int
    updates: int
    kinds: list[str]
    processes: int
    zero_stage: int
    shapes: dict[str, list[int]]
    files: list[list[list[Piece]]]


def path_of(checkpoint: Path, process: int) -> Path:
    """The file that a process writes."""
    return checkpoint / f"states_{process:05d}.pt"


def write_shares(checkpoint: Path, shares: list[Share], *, process: int) -> Sum:
    """The file of one process; raises OSError."""
    tensors = {
        f"{number}/{kind}": _alone(tensor)
        for number, share in enumerate(shares)
        for kind, tensor in share.tensors.items()
    }
    with summing(path_of(checkpoint, process)) as file:
        torch.save(tensors, file)  # pyright: ignore[reportArgumentType]
    return file.sum


def _alone(tensor: Tensor) -> Tensor:
    """Without the rest of the memory that it is a part of, which would be written as well."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def write_pieces(checkpoint: Path, written: Written) -> Sum:
    """pieces.json, by the main process; raises OSError."""
    return write_text(checkpoint / PIECES, json.dumps(asdict(written)))


class Stored:
    """The numbers of a checkpoint by name; its files are mapped into memory, not read.

    Raises what torch and json raise on files that are cut, missing or hold something else.
    """

    def __init__(self, checkpoint: Path) -> None:
        stored: dict[str, Any] = json.loads((checkpoint / PIECES).read_text())
        files = [
            [[Piece(**piece) for piece in pieces] for pieces in shares]
            for shares in stored.pop("files")
        ]
        self.about = Written(**stored, files=files)
        self._checkpoint = checkpoint
        self._opened: dict[int, dict[str, Tensor]] = {}
        self._found: dict[str, list[tuple[int, int, Piece]]] = {}
        for process, shares in enumerate(files):
            for number, pieces in enumerate(shares):
                for piece in pieces:
                    self._found.setdefault(piece.name, []).append((process, number, piece))

    def copy(self, into: Tensor, *, name: str, kind: str, start: int = 0) -> None:
        """Fill a flat tensor with the elements of a parameter from `start` on; it may cast them."""
        stop, filled = start + into.numel(), 0
        for process, number, piece in self._found[name]:
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if first >= last:
                continue
            flat = self._open(process)[f"{number}/{kind}"]
            source = flat.narrow(0, piece.offset + first - piece.start, last - first)
            into.narrow(0, first - start, last - first).copy_(source)
            filled += last - first
        if filled != into.numel():
            raise ValueError(f"{filled} of {into.numel()} elements of {name}, {kind} are there")

    def fill(self, parameter: Tensor, *, name: str) -> None:
        """Put a whole weight in its place."""
        self.copy(parameter.view(-1), name=name, kind=WEIGHT)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The name and the whole weight in fp32 of every parameter, one at a time."""
        for name, shape in self.about.shapes.items():
            weight = torch.empty(shape)
            self.fill(weight, name=name)
            yield name, weight

    def _open(self, process: int) -> dict[str, Tensor]:
        if process not in self._opened:
            path = path_of(self._checkpoint, process)
            # NOTE: mapped, so that only the pages of the ranges that are copied are ever read.
            self._opened[process] = torch.load(
                path, map_location="cpu", mmap=True, weights_only=True
            )
        return self._opened[process]
