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
    """The part of the model that a parameter belongs to, by its name; `image` brings images in."""
    top = name.partition(".")[0]
    if top in ("patch", "vision", "connector"):
        return "image"
    if top in ("embedding", "position"):
        return "embedding"
    if top == "head":
        return "head"
    (found,) = {"norm"} if "norm" in name else {"attention", "ffn"} & set(name.split("."))
    return found


@dataclass(frozen=True)
class Signals:
    """Sums over the tokens and labels of a step, all float64; `add_over_ranks` adds `sums` up.

    sums  layers + 2 + parts numbers: squares of the outputs of every layer at tokens that are not
          padding, log-partitions and their squares at labels, squares of the gradient by PARTS
    """

    sums: Tensor
    layers: int
    width: int

    @classmethod
    def zeros(cls, *, layers: int, width: int, device: torch.device) -> "Signals":
        sums = torch.zeros(layers + 2 + len(PARTS), dtype=torch.float64, device=device)
        return cls(sums, layers=layers, width=width)

    def add(self, *, layer_squares: Tensor, log_partition: Tensor) -> None:
        """Add a micro-batch: float32[layers], and float32[N] at its labels."""
        logits = torch.stack([log_partition.sum(), log_partition.square().sum()])
        self.sums[: self.layers + 2] += torch.cat([layer_squares, logits])

    def add_gradient(self, part: str, square: Tensor) -> None:
        """Add the sum of squares of a piece of the gradient that no other process adds."""
        self.sums[self.layers + 2 + PARTS.index(part)] += square

    def keys(self, *, tokens: int, labels: int) -> dict[str, Any]:
        """The keys signals/... of losses.jsonl (docs/scaling.md) from a step of so many tokens."""
        sums = self.sums.tolist()
        squares, (z, z_square), parts = (
            sums[: self.layers],
            sums[self.layers : self.layers + 2],
            sums[self.layers + 2 :],
        )
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
        }
