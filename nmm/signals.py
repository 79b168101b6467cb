"""Numbers that tell early whether a training is about to diverge, from sums over a step.

The norm of the last layer's output foretells it ("Chameleon", section 2.3.2), and so does a
partition function that drifts. Sums over processes and micro-batches give the same numbers however
a step is split.
"""

import sys
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nmm.config import ModelConfig

PARTS = ("embedding", "image", "attention", "ffn", "norm", "head")


def part(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name; `image` brings images in.

    Routers belong to `ffn`.
    """
    top = name.partition(".")[0]
    if top in ("patch", "vision", "connector"):
        return "image"
    if top in ("embedding", "position"):
        return "embedding"
    if top == "head":
        return "head"
    if "depth_router" in name:
        return "ffn"
    (found,) = {"norm"} if "norm" in name else {"attention", "ffn"} & set(name.split("."))
    return found


def router_layer(name: str) -> int | None:
    """The layer whose router of experts has this parameter: "blocks.3.ffn.router.weight" -> 3."""
    words = name.split(".")
    return int(words[1]) if "router" in words else None


def depth_layer(name: str) -> int | None:
    """The layer that takes some tokens and whose router has this parameter."""
    words = name.split(".")
    return int(words[1]) if "depth_router" in words else None


@dataclass(frozen=True)
class Signals:
    """Sums over the tokens and labels of a step, all float64; `add_over_ranks` adds them up.

    Legend of shapes: Y layers, R groups of experts that have a router (0 without one).

    sums  one tensor: squares of the outputs of every layer at tokens that are not padding [Y],
          log-partitions and their squares at labels [2], squares of the gradient by PARTS and, in
          `ffn` too, of the routers of every layer: by group of experts [Y, R], and of depth [Y]
    """

    sums: Tensor
    config: ModelConfig

    @classmethod
    def zeros(cls, config: ModelConfig, *, device: torch.device) -> "Signals":
        empty = cls(torch.zeros(0, dtype=torch.float64, device=device), config)
        return cls(empty.sums.new_zeros(sum(empty._sizes)), config)

    @property
    def _groups(self) -> dict[str, int]:
        """The experts that each router decides on."""
        return self.config.moe.sizes if self.config.moe.has_router else {}

    @property
    def _sizes(self) -> list[int]:
        layers = self.config.depth
        return [layers, 2, len(PARTS), layers * len(self._groups), layers]

    def add(self, *, layer_squares: Tensor, log_partition: Tensor) -> None:
        """Add a micro-batch: float32[Y], and float32[N] at its labels."""
        logits = torch.stack([log_partition.sum(), log_partition.square().sum()])
        self.sums[: self.config.depth + 2] += torch.cat([layer_squares, logits])

    def add_gradient(self, name: str, piece: Tensor, *, start: int = 0) -> None:
        """Add a piece of a parameter's gradient that no other process adds.

        `name` is the parameter's; the piece begins at its element `start`.
        """
        _, _, parts, routers, depth = self.sums.split(self._sizes)
        square = _square(piece)
        parts[PARTS.index(part(name))] += square
        layer = router_layer(name)
        if layer is not None:
            of_layer = routers.view(self.config.depth, -1)[layer]
            for number, (first, last) in enumerate(self._stretches(name)):
                inside = piece.flatten()[max(0, first - start) : max(0, last - start)]
                of_layer[number] += _square(inside)
        layer = depth_layer(name)
        if layer is not None:
            depth[layer] += square

    def _stretches(self, name: str) -> list[tuple[int, int]]:
        """Of a router's parameter the first element of every group's, and that behind its last."""
        words = name.split(".")
        if "auxiliary" in words:  # every group has its own
            return [(0, sys.maxsize if group in words else 0) for group in self._groups]
        ends = [self.config.width * end for end in accumulate(self._groups.values())]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def keys(self, *, tokens: int, labels: int) -> dict[str, Any]:
        """The keys signals/... of losses.jsonl (docs/scaling.md) from a step of so many tokens."""
        squares, logits, parts, routers, depth = (x.tolist() for x in self.sums.split(self._sizes))
        z, z_square = logits
        return {
            **{
                f"signals/output_rms/{layer}": (square / (max(tokens, 1) * self.config.width))
                ** 0.5
                for layer, square in enumerate(squares)
            },
            "signals/logit_z/mean": z / labels if labels else None,
            "signals/logit_z/rms": (z_square / labels) ** 0.5 if labels else None,
            **{
                f"signals/grad_norm/{name}": square**0.5
                for name, square in zip(PARTS, parts, strict=True)
            },
            **self._router_keys(routers),
            **{
                f"signals/depth_router_grad_norm/{layer}": square**0.5
                for layer, square in enumerate(depth)
                if self.config.mod.picks(layer)
            },
        }

    def _router_keys(self, squares: list[float]) -> dict[str, float]:
        """Of every layer, and in it of each modality that has experts of its own."""
        names, found = list(self._groups), {}
        for layer in range(self.config.depth if names else 0):
            of_layer = squares[layer * len(names) : (layer + 1) * len(names)]
            key = f"signals/router_grad_norm/{layer}"
            found[key] = sum(of_layer) ** 0.5
            if names != ["all"]:
                by_name = zip(names, of_layer, strict=True)
                found |= {f"{key}/{name}": square**0.5 for name, square in by_name}
        return found


def _square(piece: Tensor) -> Tensor:
    """float64: the sum of squares, without a copy in another precision."""
    return torch.linalg.vector_norm(piece, dtype=torch.float32).double().square()
