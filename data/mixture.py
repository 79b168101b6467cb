"""The weights of the sources along the rows, and what they ask of every source."""

from dataclasses import dataclass

from data.order import Taken
from nmm.config import DataConfig


@dataclass(frozen=True)
class Stage:
    """From row `row` on the sources have these weights."""

    row: int
    weights: list[float]


def stages(config: DataConfig) -> list[Stage]:
    """The weights that data.sources gives, and those after every entry of data.weight_changes."""
    weights = {name: source.weight for name, source in config.sources.items()}
    found = [Stage(0, list(weights.values()))]
    for change in config.weight_changes:
        weights |= change.weights
        found.append(Stage(change.step * config.global_rows, list(weights.values())))
    return found


def asked(stages: list[Stage], *, tokens: float, row_tokens: int) -> list[float]:
    """Tokens that every source gives to the first `tokens`."""
    total = [0.0] * len(stages[0].weights)
    for stage, stop in _spans(stages, tokens=tokens, row_tokens=row_tokens):
        length = stop - stage.row * row_tokens
        for source, weight in enumerate(stage.weights):
            total[source] += length * weight / sum(stage.weights)
    return total


def reach(stages: list[Stage], *, source: int, supply: float, row_tokens: int) -> float:
    """Tokens of all sources together when a source has given `supply`: `asked`, backwards."""
    given = 0.0
    for number, stage in enumerate(stages):
        share = stage.weights[source] / sum(stage.weights)
        start = stage.row * row_tokens
        end = start + (supply - given) / share
        if number + 1 == len(stages) or end <= stages[number + 1].row * row_tokens:
            return end
        given += share * (stages[number + 1].row * row_tokens - start)
    raise AssertionError("the last stage has no end")


def change_weights(taken: Taken, old: list[float]) -> Taken:
    """The same place, ready for other weights: all shares count from a common now.

    Under the `old` weights source i was asked for weight_i * now tokens; what it is ahead or behind
    of that, at most half a document, it stays ahead or behind. So the shares of no stage drift.
    """
    given = [tokens - origin for tokens, origin in zip(taken.tokens, taken.origin, strict=True)]
    now = sum(given) / sum(old)
    origin = [start + round(weight * now) for start, weight in zip(taken.origin, old, strict=True)]
    return Taken(taken.documents, taken.tokens, origin)


def _spans(stages: list[Stage], *, tokens: float, row_tokens: int) -> list[tuple[Stage, float]]:
    """Every stage that begins before `tokens`, with the token where it ends."""
    ends = [*(stage.row * row_tokens for stage in stages[1:]), tokens]
    return [
        (stage, min(end, tokens))
        for stage, end in zip(stages, ends, strict=True)
        if stage.row * row_tokens < tokens
    ]
