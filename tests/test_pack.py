"""Pieces cover their document and never cut an image; rows hold every piece, nearly full."""

import time

import numpy as np
import pytest

from data.pack import best_fit, pieces

IMAGE_TOKENS = 16


def random_segments(rng: np.random.Generator) -> np.ndarray:
    count = int(rng.integers(1, 12))
    return np.where(rng.random(count) < 0.5, -1, rng.integers(0, 200, count)).astype(np.int32)


def test_the_drawn_example() -> None:
    segments = np.array([4, -1, 6], np.int32)
    assert pieces(segments, image_tokens=3, context_tokens=8) == [(0, 8), (8, 15)]


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
    found = pieces(np.array(segments, np.int32), image_tokens=IMAGE_TOKENS, context_tokens=64)
    assert found == expected


def test_an_image_right_behind_an_almost_empty_piece_is_not_cut() -> None:
    found = pieces(np.array([10, -1], np.int32), image_tokens=60, context_tokens=64)
    assert found == [(0, 11), (11, 72)]


def test_pieces_cover_the_document_and_never_cut_an_image() -> None:
    rng = np.random.default_rng(0)
    cut = 0
    for _ in range(500):
        segments = random_segments(rng)
        tokens = np.where(segments < 0, IMAGE_TOKENS, segments)
        total = 2 + int(tokens.sum())
        found = pieces(segments, image_tokens=IMAGE_TOKENS, context_tokens=64)
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert found[-1][1] == total
        assert all(0 < stop - start <= 64 for start, stop in found)
        assert (len(found) == 1) == (total <= 64)
        ends = 1 + np.cumsum(tokens)
        for segment, end in zip(segments.tolist(), ends.tolist(), strict=True):
            if segment < 0:
                inside = range(end - IMAGE_TOKENS + 1, end)
                assert not any(stop in inside for _, stop in found)
        cut += len(found) > 1
    assert cut > 100


def mix(rng: np.random.Generator, count: int) -> list[int]:
    """Pieces as a mix gives them: captions, full pieces of long documents, and their tails."""
    captions = 256 + np.clip(rng.lognormal(4.1, 0.7, count), 3, 700).astype(int)
    tails = rng.integers(2, 1025, count // 4)
    return np.concatenate([captions, tails, np.full(count // 4, 1024)]).tolist()


@pytest.mark.parametrize("row_tokens", [1024, 4096, 8192])
def test_rows_hold_every_piece_once(row_tokens: int) -> None:
    lengths = mix(np.random.default_rng(0), 2732)
    rows = best_fit(lengths, row_tokens)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    used = [sum(lengths[item] for item in row) for row in rows]
    assert max(used) <= row_tokens
    assert sum(used) / (len(rows) * row_tokens) > (0.995 if row_tokens >= 4096 else 0.9)


def test_packing_is_best_fit() -> None:
    """6 opens a row with 4 left, 5 one with 5 left; 4 goes where it fits exactly."""
    assert best_fit([5, 6, 4, 3, 2], 10) == [[1, 2], [0, 3, 4]]
    assert best_fit([3, 3, 3], 3) == [[0], [1], [2]]


def test_packing_a_window_is_quick() -> None:
    lengths = mix(np.random.default_rng(0), 2732)
    assert len(lengths) >= 4096
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        best_fit(lengths, 4096)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.03
