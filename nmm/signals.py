"""Numbers that tell early whether a training is about to diverge, from sums over a step.

The norm of the last layer's output foretells it ("Chameleon", section 2.3.2), and so does a
partition function that drifts. Sums over processes and micro-batches give the same numbers however
a step is split.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    """The layer whose router has this parameter: "blocks.3.ffn.router.weight" -> 3."""
    words = name.split(".")
    return int(words[1]) if "router" in words else None


@dataclass(frozen=True)
class Signals:
    """Sums over the tokens and labels of a step, all float64; `add_over_ranks` adds `sums` up.

    sums  2 layers + 2 + parts numbers: squares of the outputs of every layer at tokens that are not
          padding, log-partitions and their squares at labels, squares of the gradient by PARTS and
          of every layer's router, which is one of `ffn` too
    """

    sums: Tensor
    layers: int
    width: int
    has_routers: bool

    @classmethod
    def zeros(
        cls, *, layers: int, width: int, has_routers: bool, device: torch.device
    ) -> "Signals":
        sums = torch.zeros(2 * layers + 2 + len(PARTS), dtype=torch.float64, device=device)
        return cls(sums, layers=layers, width=width, has_routers=has_routers)

    def add(self, *, layer_squares: Tensor, log_partition: Tensor) -> None:
        """Add a micro-batch: float32[layers], and float32[N] at its labels."""
        logits = torch.stack([log_partition.sum(), log_partition.square().sum()])
        self.sums[: self.layers + 2] += torch.cat([layer_squares, logits])

    def add_gradient(self, name: str, square: Tensor) -> None:
        """Add the sum of squares of a piece of a parameter's gradient that no other process adds.

        `name` is the parameter's.
        """
        self.sums[self.layers + 2 + PARTS.index(part(name))] += square
        layer = router_layer(name)
        if layer is not None:
            self.sums[self.layers + 2 + len(PARTS) + layer] += square

    def keys(self, *, tokens: int, labels: int) -> dict[str, Any]:
        """The keys signals/... of losses.jsonl (docs/scaling.md) from a step of so many tokens."""
        sizes = [self.layers, 2, len(PARTS), self.layers]
        squares, (z, z_square), parts, routers = (x.tolist() for x in self.sums.split(sizes))
        return {
            **{
                f"signals/output_rms/{layer}": (square / (max(tokens, 1) * self.width)) ** 0.5
                for layer, square in enumerate(squares)
            },
            "signals/logit_z/mean": z / labels if labels else None,
            "signals/logit_z/rms": (z_square / labels) ** 0.5 if labels else None,
            **{
                f"signals/grad_norm/{name}": square**0.5
                for name, square in zip(PARTS, parts, strict=True)
            },
            **{
                f"signals/router_grad_norm/{layer}": square**0.5
                for layer, square in enumerate(routers)
                if self.has_routers
            },
        }
