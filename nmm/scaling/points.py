"""Points to fit: columns of numbers with one loss each, in nats per token."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Points:
    """n points; every column and `loss` are float64[n], `names` says where a point comes from."""

    columns: Mapping[str, np.ndarray]
    loss: np.ndarray
    names: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, chosen: np.ndarray) -> "Points":
        """The points where bool[n] is true, or those of int[m]."""
        places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Points(
            {name: column[places] for name, column in self.columns.items()},
            self.loss[places],
            tuple(self.names[place] for place in places) if self.names else (),
        )
