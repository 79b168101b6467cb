"""Draws are the published generator's, the same for one document and for many, and even."""

from itertools import product

import numpy as np
import pytest

from data.draws import Purpose, key, uniform, uniforms

PLACE = {"seed": 7, "epoch": 3, "source": 1, "shard": 20}


def test_the_numbers_are_those_of_splitmix64() -> None:
    """Its published outputs for the seed 1,234,567, of which a draw keeps the upper 53 bits."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = [uniform(1234567, number) for number in range(5)]
    assert found == [(word >> 11) / 2**53 for word in published]


@pytest.mark.parametrize(
    ("purpose", "place", "word"),
    [
        (Purpose.text_first, (0, 0, 0, 0, 0), 8483968834307291576),
        (Purpose.view, (0, 0, 0, 0, 0), 8811202920272915789),
        (Purpose.view, (7, 3, 1, 20, 0), 9279633455438994406),
        (Purpose.view, (7, 3, 1, 20, 999), 17510148578388431171),
        (Purpose.view, (2**63 - 1, 10**6, 254, 10**6, 2**31 - 1), 7551641898463262522),
    ],
)
def test_keys_are_pinned(purpose: Purpose, place: tuple, word: int) -> None:
    """Another key is another crop, and an ORDER BREAK where text comes first."""
    seed, epoch, source, shard, document = place
    assert (
        key(purpose, seed=seed, epoch=epoch, source=source, shard=shard, document=document) == word
    )


def test_many_documents_draw_what_each_draws_alone() -> None:
    keys = key(Purpose.view, **PLACE, document=np.arange(500, dtype=np.uint64))
    for number in (0, 1, 40):
        drawn = uniforms(keys, number)
        assert (drawn.dtype, drawn.shape) == (np.float64, (500,))
        alone = [uniform(key(Purpose.view, **PLACE, document=i), number) for i in range(500)]
        assert drawn.tolist() == alone
        backwards = uniforms(keys[::-1], number)[::-1]
        assert np.array_equal(backwards, drawn)


def test_every_coordinate_changes_the_draws() -> None:
    """No two of 6,144 neighbouring places share a key, and none of their draws move together."""
    places = product(Purpose, (0, 1), range(4), range(4), range(8), range(8))
    keys = np.array(
        [
            key(purpose, seed=seed, epoch=epoch, source=source, shard=shard, document=document)
            for purpose, seed, epoch, source, shard, document in places
        ],
        np.uint64,
    )
    assert len(np.unique(keys)) == len(Purpose) * 2 * 4 * 4 * 8 * 8
    drawn = uniforms(keys, 0).reshape(len(Purpose), 2, 4, 4, 8, 8)
    for axis in range(drawn.ndim):
        first, second = (np.take(drawn, [i], axis=axis).ravel() for i in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / len(first) ** 0.5


@pytest.mark.parametrize("number", [0, 1, 7])
def test_draws_are_uniform(number: int) -> None:
    """A hundred bins of 200,000 documents, by chi-squared; and pairs of draws in 100 squares."""
    keys = key(Purpose.view, **PLACE, document=np.arange(200_000, dtype=np.uint64))
    drawn, following = uniforms(keys, number), uniforms(keys, number + 1)
    assert (drawn.min() >= 0, drawn.max() < 1) == (True, True)
    squares = np.floor(10 * drawn) * 10 + np.floor(10 * following)
    for bins in (np.floor(100 * drawn), squares):
        counts = np.bincount(bins.astype(int), minlength=100)
        chi_squared = ((counts - 2000.0) ** 2 / 2000).sum()
        assert 50 < chi_squared < 160  # 99 degrees of freedom: one in 10,000 is above
