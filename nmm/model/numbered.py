"""Weights of experts in files for others: a tensor for each, under its number in the layer.

A layer keeps its experts side by side, so that one product serves all. A file does not tell how:

    in the model    blocks.3.ffn.experts.w1 [E, F, D]
    in a file       blocks.3.ffn.experts.0.w1 [F, D]   blocks.3.ffn.experts.1.w1 [F, D]   ...
"""

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
IN_MODEL = re.compile(r"(.+\.experts)\.(w[123])")
IN_FILE = re.compile(r"(.+\.experts)\.(0|[1-9][0-9]*)\.(w[123])")


def one_by_one(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights under the names of a file; those of experts are views."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if experts := IN_MODEL.fullmatch(name):
            found |= {f"{experts[1]}.{e}.{experts[2]}": one for e, one in enumerate(weight)}
        else:
            found[name] = weight
    return found


def side_by_side(found: Mapping[str, T], *, stack: Callable[[list[T]], T]) -> dict[str, T]:
    """What a file has, under the names of a model; `stack` joins experts along a new first axis.

    Experts whose numbers are not 0, 1, 2, ... keep their names, which no model has.
    """
    layers: dict[str, dict[int, str]] = {}
    for name in found:
        if expert := IN_FILE.fullmatch(name):
            layers.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = name
    joined = dict(found)
    for layer, names in layers.items():
        if set(names) == set(range(len(names))):
            joined[layer] = stack([joined.pop(names[number]) for number in range(len(names))])
    return joined
