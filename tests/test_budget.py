"""A budget of images: no row holds more, nothing is lost, and little is left empty."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from data import pack
from data.block import Blocks
from data.budget import fill_rows_within
from data.layout import Reader, build
from data.pack import fill_rows
from data.plan import StreamState, plan_rows
from data.sequences import segment_tokens
from nmm.config import compose, load
from nmm.errors import UserError
from tests import corpora, lengths


def random_documents(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and borders of documents of texts (some empty) and images in any order."""
    sizes = rng.integers(1, 12, count)
    segment = np.where(rng.random(sizes.sum()) < 0.4, -1, rng.integers(0, 90, sizes.sum()))
    return segment.astype(np.int32), np.concatenate([[0], np.cumsum(sizes)])


def test_the_images_of_every_piece_are_counted() -> None:
    """Against the positions written out, for documents that fit and for those that are cut."""
    segment, border = random_documents(np.random.default_rng(0), 400)
    tokens = segment_tokens(segment, 16)
    sums = np.add.reduceat(tokens, border[:-1])
    cuts = pack.cut(
        (2 + sums).astype(np.int32),
        segment=segment,
        border=border,
        image_tokens=16,
        context_tokens=64,
    )
    several = 0
    for document in range(400):
        here = slice(border[document], border[document + 1])
        is_image = np.concatenate([[False], np.repeat(segment[here] < 0, tokens[here]), [False]])
        pieces = range(cuts.border[document], cuts.border[document + 1])
        for piece in pieces:
            inside = is_image[cuts.start[piece] : cuts.stop[piece]]
            assert cuts.images[piece] * 16 == inside.sum()
        several += len(pieces) > 2
    assert several > 100


def check_rows(
    sizes: np.ndarray, images: np.ndarray, *, row_tokens: int, max_images: int
) -> list[list[int]]:
    """Rows within both limits that hold every piece once, the same whenever asked for."""
    rows = fill_rows_within(sizes, row_tokens, images=images, max_images=max_images)
    assert sorted(piece for row in rows for piece in row) == list(range(len(sizes)))
    assert max(sizes[row].sum() for row in rows) <= row_tokens
    assert max(images[row].sum() for row in rows) <= max_images
    assert fill_rows_within(sizes, row_tokens, images=images, max_images=max_images) == rows
    return rows


def test_rows_of_any_pieces() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        row_tokens, count = int(rng.integers(4, 50)), int(rng.integers(1, 60))
        sizes = rng.integers(1, row_tokens + 1, count).astype(np.int32)
        images = rng.integers(0, 4, count).astype(np.int32)
        rows = check_rows(sizes, images, row_tokens=row_tokens, max_images=int(rng.integers(3, 9)))
        # Two rows that are both less than half full in tokens and in images would have been one.
        poor = [r for r in rows if 2 * sizes[r].sum() <= row_tokens and not images[r].sum()]
        assert len(poor) <= 1
    empty = np.zeros(0, np.int32)
    assert fill_rows_within(empty, 8, images=empty, max_images=1) == []


def test_a_row_without_room_takes_pieces_without_images() -> None:
    """By hand: 8 6 6 fill a row of 20; with two images a row, the 6 that has none is taken."""
    sizes, images = np.array([8, 6, 6, 6], np.int32), np.array([1, 1, 1, 0], np.int32)
    assert fill_rows(sizes, 20) == [[0, 1, 2], [3]]
    assert fill_rows_within(sizes, 20, images=images, max_images=3) == [[0, 1, 2], [3]]
    assert fill_rows_within(sizes, 20, images=images, max_images=2) == [[0, 3, 1], [2]]
    assert fill_rows_within(sizes, 20, images=images, max_images=1) == [[0, 3], [1], [2]]


@pytest.mark.parametrize(
    ("mix", "max_images", "fill"),
    [
        ("45-45-10", 16, 0.995),  # as many as fit into the tokens
        ("45-45-10", 14, 0.995),
        ("45-45-10", 12, 0.97),  # the mean is 11.4
        ("45-45-10", 8, 0.69),  # 8 / 11.4 is all that can be filled
        ("30-30-40", 9, 0.995),  # the mean is 7.6
    ],
)
def test_a_budget_above_the_mean_costs_nothing(mix: str, max_images: int, fill: float) -> None:
    """Windows of 4,096 documents in rows of 4,096 with images of 256 tokens."""
    for seed in range(2):
        sizes, images = lengths.pieces(mix, documents=4096, seed=seed)
        rows = check_rows(sizes, images, row_tokens=4096, max_images=max_images)
        assert sizes.sum() / (4096 * len(rows)) >= fill


def test_planned_rows_keep_the_budget_and_lose_nothing() -> None:
    """As built: the images of every row; one epoch without repetition has every document once."""
    config = corpora.config(max_row_images=4, repeat=False)
    corpus = corpora.open_corpus(config)
    free = [row for row, _ in plan_rows(corpus, replace(config, max_row_images=None))]
    plan = list(plan_rows(corpus, config))
    rows = [row for row, _ in plan]
    assert sorted(piece for row in rows for piece in row) == sorted(p for row in free for p in row)
    reader = Reader(corpus, seed=config.seed)
    counts, free_counts = (
        [len(build([row], reader=reader, row_tokens=128, blocks=Blocks()).pixels) for row in some]
        for some in (rows, free)
    )
    assert max(counts) == 4 < max(free_counts)
    assert sum(counts) == sum(free_counts)
    for at in (5, 40, 80):
        state = StreamState.from_dict(plan[at][1].to_dict())
        assert list(islice(plan_rows(corpus, config, state), 20)) == plan[at + 1 : at + 21]


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (0, r"data\.max_row_images is 0; set it above 0"),
        (31, r"data\.max_row_images is 31 but 32 images of 16 tokens fit into the 512 tokens"),
    ],
)
def test_a_budget_that_one_piece_may_exceed_is_refused(budget: int, sentence: str) -> None:
    few = ("schedule.total_steps=9", "model.image.side_pixels=32", "model.image.patch_pixels=8")
    assert load(compose([*few, "data.max_row_images=32"])).data.max_row_images == 32
    with pytest.raises(UserError, match=sentence):
        load(compose([*few, f"data.max_row_images={budget}"]))
