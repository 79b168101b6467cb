"""Pieces cover their document and never cut an image; rows hold every piece, nearly full."""

import time

import numpy as np
import pytest

from data import pack
from data.pack import deal, fill_rows
from data.sequences import segment_tokens
from tests import lengths as made_up

IMAGE_TOKENS = 16


def random_segments(rng: np.random.Generator) -> np.ndarray:
    count = int(rng.integers(1, 12))
    return np.where(rng.random(count) < 0.5, -1, rng.integers(0, 200, count)).astype(np.int32)


def pieces(
    documents: list[np.ndarray], *, image_tokens: int, context_tokens: int
) -> list[list[tuple[int, int]]]:
    """Pieces of all documents, cut together."""
    lengths = [2 + segment_tokens(each, image_tokens).sum() for each in documents]
    cuts = pack.cut(
        np.array(lengths, np.int32),
        segment=np.concatenate(documents),
        border=np.cumsum([0, *map(len, documents)]),
        image_tokens=image_tokens,
        context_tokens=context_tokens,
    )
    places = list(zip(cuts.start.tolist(), cuts.stop.tolist(), strict=True))
    return [places[a:b] for a, b in zip(cuts.border, cuts.border[1:], strict=False)]


def pieces_written_out(
    segments: list[int], *, image_tokens: int, context_tokens: int
) -> list[tuple[int, int]]:
    """The rule of data/pack.py, position by position."""
    inside, borders, total = set(), [], 1
    for segment in segments:
        tokens = image_tokens if segment < 0 else segment
        if segment < 0:
            inside |= set(range(total + 1, total + tokens))
        total += tokens
        borders.append(total)
    total += 1
    cuts = [0]
    while total - cuts[-1] > context_tokens:
        limit = cuts[-1] + context_tokens
        border = max((b for b in borders if b <= limit), default=1)
        starts_image = any(
            segment < 0 and start == limit
            for segment, start in zip(segments, [1, *borders], strict=False)
        )
        near = 4 * (border - cuts[-1]) >= 3 * context_tokens
        cuts.append(border if near or limit in inside or starts_image else limit)
    return list(zip(cuts, [*cuts[1:], total], strict=True))


def test_the_drawn_example() -> None:
    segments = np.array([4, -1, 6], np.int32)
    assert pieces([segments], image_tokens=3, context_tokens=8) == [[(0, 8), (8, 15)]]


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([62], [(0, 64)]),
        ([63], [(0, 64), (64, 65)]),
        ([200], [(0, 64), (64, 128), (128, 192), (192, 202)]),
        ([50, 40], [(0, 51), (51, 92)]),  # the border leaves the piece 51/64 full
        ([40, 50], [(0, 64), (64, 92)]),  # the border at 41 does not
        ([30, -1, -1, -1], [(0, 63), (63, 80)]),
        ([40, -1, 40], [(0, 57), (57, 98)]),
        ([20, 35, -1, -1], [(0, 56), (56, 89)]),  # inside an image at 64
        ([10, 40, 5, -1], [(0, 56), (56, 73)]),
    ],
)
def test_where_documents_are_cut(segments: list[int], expected: list[tuple[int, int]]) -> None:
    document = np.array(segments, np.int32)
    assert pieces([document], image_tokens=IMAGE_TOKENS, context_tokens=64) == [expected]


def test_an_image_right_behind_an_almost_empty_piece_is_not_cut() -> None:
    found = pieces([np.array([10, -1], np.int32)], image_tokens=60, context_tokens=64)
    assert found == [[(0, 11), (11, 72)]]


def test_pieces_cover_the_document_and_never_cut_an_image() -> None:
    """All documents cut together are as each by itself, by the rule written out."""
    rng = np.random.default_rng(0)
    documents = [random_segments(rng) for _ in range(500)]
    together = pieces(documents, image_tokens=IMAGE_TOKENS, context_tokens=64)
    for segments, found in zip(documents, together, strict=True):
        tokens = np.where(segments < 0, IMAGE_TOKENS, segments)
        total = 2 + int(tokens.sum())
        assert found == pieces_written_out(
            segments.tolist(), image_tokens=IMAGE_TOKENS, context_tokens=64
        )
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert found[-1][1] == total
        assert all(0 < stop - start <= 64 for start, stop in found)
        assert (len(found) == 1) == (total <= 64)
        ends = 1 + np.cumsum(tokens)
        for segment, end in zip(segments.tolist(), ends.tolist(), strict=True):
            if segment < 0:
                inside = range(end - IMAGE_TOKENS + 1, end)
                assert not any(stop in inside for _, stop in found)
    assert sum(len(found) > 1 for found in together) > 100


def check_rows(lengths: np.ndarray, row_tokens: int) -> float:
    """Every piece is in one row, and no row holds too much; returns the fill."""
    rows = fill_rows(lengths, row_tokens)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert max(sum(lengths[row]) for row in rows) <= row_tokens
    return float(lengths.sum() / (len(rows) * row_tokens))


@pytest.mark.parametrize(
    ("mix", "row_tokens", "fill"),
    [
        ("45-45-10", 4096, 0.995),
        ("45-45-10", 8192, 0.995),
        ("30-30-40", 4096, 0.995),
        ("100-0-0", 4096, 0.98),  # captions of 300 tokens alone do not fit better
        ("0-0-100", 1024, 0.98),
        ("45-45-10", 1024, 0.89),
    ],
)
def test_rows_hold_every_piece_once_and_are_full(mix: str, row_tokens: int, fill: float) -> None:
    """Windows of 4,096 documents with images of 256 tokens and a context of 1,024."""
    for seed in range(3):
        lengths, _ = made_up.pieces(mix, documents=4096, seed=seed)
        assert check_rows(lengths, row_tokens) >= fill


def test_rows_of_any_lengths() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        row_tokens = int(rng.integers(1, 50))
        lengths = rng.integers(1, row_tokens + 1, rng.integers(1, 40)).astype(np.int32)
        rows = lengths.sum() / (check_rows(lengths, row_tokens) * row_tokens)
        assert rows * row_tokens <= 2 * lengths.sum() + row_tokens
    assert fill_rows(np.zeros(0, np.int32), 8) == []


def test_rows_are_closed_exactly_from_all_pieces() -> None:
    """The example of the docstring, and rows without a beginning of their own."""
    drawn = np.array([9, 7, 12, 5, 8, 6, 11, 4], np.int32)
    assert fill_rows(drawn, 40) == [[0, 2, 6, 4], [1, 3, 5, 7]]
    assert fill_rows(np.array([9, 7, 2, 3, 4, 6, 5], np.int32), 20) == [[0, 5, 6], [1, 4, 3, 2]]
    assert fill_rows(np.array([3, 3, 3], np.int32), 3) == [[0], [1], [2]]


def test_rows_hold_the_mixture_of_the_stream() -> None:
    """Rows are alike: none of long pieces only, as rows packed from the longest down would be."""
    lengths = np.tile(np.array([300, 1000, 500, 200], np.int32), 500)
    rows = fill_rows(lengths, 4000)
    longest = [max(lengths[row]) for row in rows]
    counts = [len(row) for row in rows]
    assert np.mean([length == 1000 for length in longest]) > 0.95
    assert np.mean([count >= 6 for count in counts]) > 0.9


def test_packing_a_window_is_quick() -> None:
    lengths, _ = made_up.pieces("45-45-10", documents=4096, seed=0)
    assert len(lengths) > 4096
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        fill_rows(lengths, 4096)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.015


def test_rows_are_dealt_evenly() -> None:
    """Every row once, and every stretch of rows with nearly the shares of all."""
    rng = np.random.default_rng(0)
    tokens = rng.multinomial(10, (0.45, 0.45, 0.1), 600) * 400
    order = deal(tokens)
    assert sorted(order.tolist()) == list(range(600))
    dealt, mean = tokens[order].cumsum(axis=0), tokens.mean(axis=0)
    drift = np.abs(dealt - np.outer(np.arange(1, 601), mean)).max()
    at_random = np.abs(tokens.cumsum(axis=0) - np.outer(np.arange(1, 601), mean)).max()
    assert drift < 5 * 4000
    assert drift < at_random / 2
    for rows, sources in ((0, 1), (1, 1), (1, 3), (7, 1), (9, 2)):
        some = rng.integers(0, 100, (rows, sources))
        assert sorted(deal(some).tolist()) == list(range(rows))
