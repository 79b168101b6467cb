"""Randomness without state: every number is a pure function of what it is drawn for.

Nothing is consumed, so it does not matter who draws, when, how often, or in which process. Words of
64 bits are mixed as in "Fast Splittable Pseudorandom Number Generators" (Steele, Lea and Flood,
2014), by whole-number operations that every machine and every version of numpy agree on.
"""

from enum import IntEnum
from typing import TypeVar

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio
MASK = 2**64 - 1

# One word as an int, or many as uint64[n].
Words = TypeVar("Words", int, np.ndarray)


class Purpose(IntEnum):
    """What a number is drawn for; draws of different purposes know nothing of each other."""

    text_first = 1
    view = 2
    spans = 3


def key(
    purpose: Purpose, *, seed: int, epoch: int, source: int, shard: int, document: Words
) -> Words:
    """The key of a document's draws, or uint64[n], those of n documents of a shard.

    Source, shard and document are places in the corpus.
    """
    word = 0
    for part in (seed, purpose, epoch, source, shard):
        word = _mixed(((word ^ part) + GOLDEN) & MASK)
    return _mixed(((document ^ word) + GOLDEN) & MASK)


def within(key: Words, part: Words) -> Words:
    """The key of a part of what `key` is of, such as the piece that begins at token `part`."""
    return _mixed(((key ^ part) + GOLDEN) & MASK)


def uniform(key: int, number: int) -> float:
    """The draw `number` (0, 1, ...) of a key, in [0, 1)."""
    return (_word(key, number) >> 11) * 2.0**-53


def uniforms(keys: np.ndarray, number: int) -> np.ndarray:
    """float64[n]: the `uniform` draw `number` of each of n keys."""
    return (_word(keys, number) >> 11) * 2.0**-53


def _word(key: Words, number: int) -> Words:
    return _mixed((key + (number + 1) * GOLDEN % 2**64) & MASK)


def _mixed(words: Words) -> Words:
    """A bijection of words in which every bit moves every other."""
    words = ((words ^ (words >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    words = ((words ^ (words >> 27)) * 0x94D049BB133111EB) & MASK
    return words ^ (words >> 31)
