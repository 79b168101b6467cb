"""Does the law predict what it has not seen? Beside it, what anybody with a ruler would say."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nmm.errors import UserError
from nmm.scaling.metrics import agreement
from nmm.scaling.points import Points

LARGEST_FRACTION = 0.05  # of the points that the largest sizes must make up, at least
COMPARISONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Split:
    """`rule` in words, and which points it holds out."""

    rule: str
    held_out: np.ndarray


def by_rule(points: Points, *, rule: str) -> Split:
    """ "N>1e9" or "N>1e9,D<=4e10" (both); raises UserError for anything else."""
    held_out = np.ones(len(points), dtype=bool)
    for part in rule.split(","):
        match = re.fullmatch(r"\s*([\w/]+)\s*(>=|<=|>|<)\s*([\d.eE+-]+)\s*", part)
        columns = {**points.columns, "L": points.loss}
        if match is None or match[1] not in columns:
            raise UserError(
                f"--holdout is {rule!r}; write it like N>1e9, with one of {', '.join(columns)}."
            )
        try:
            limit = float(match[3])
        except ValueError:
            raise UserError(f"--holdout is {rule!r}; {match[3]} is no number.") from None
        held_out &= COMPARISONS[match[2]](columns[match[1]], limit)
    if held_out.all() or not held_out.any():
        raise UserError(
            f"--holdout is {rule!r}, which holds out {held_out.sum()} of {len(points)} points; "
            f"choose a limit between the smallest and the largest value."
        )
    return Split(rule, held_out)


def largest(points: Points) -> Split | None:
    """The largest sizes that are LARGEST_FRACTION of the points; None if no two would be left."""
    sizes = points.columns["N"]
    for limit in np.unique(sizes)[::-1]:
        held_out = sizes >= limit
        if held_out.mean() >= LARGEST_FRACTION:
            enough = len(np.unique(sizes[~held_out])) > 1
            return Split(f"N>={limit:g}", held_out) if enough else None
    return None


def ruler(seen: Points, *, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Losses by a plane through the logs, log L = u + v log N + w log D: a law without a floor."""

    def design(of: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.stack([np.ones_like(of["N"]), np.log(of["N"]), np.log(of["D"])], axis=1)

    plane, *_ = np.linalg.lstsq(design(seen.columns), np.log(seen.loss), rcond=None)
    return np.exp(design(columns) @ plane)


def verdict(predicted: np.ndarray, *, points: Points, split: Split) -> dict[str, object]:
    """On the held-out points: a law that was fitted to the others, and the ruler."""
    unseen = points.select(split.held_out)
    naive = ruler(points.select(~split.held_out), columns=unseen.columns)
    return {
        "rule": split.rule,
        "points": int(split.held_out.sum()),
        "fitted_points": int((~split.held_out).sum()),
        "metrics": agreement(predicted, measured=unseen.loss),
        "naive_metrics": agreement(naive, measured=unseen.loss),
    }
