"""Pictures: their numbers, the rows they survive, and bytes that depend on the rows alone."""

import math
from pathlib import Path

import pytest
from PIL import Image

from nmm.plot import loss_figure, running_mean, schedule_figure, short_count


def test_running_mean_is_the_mean_of_the_neighbours() -> None:
    assert running_mean([1, 2, 6, 3, 3], window=3).tolist() == pytest.approx([1.5, 3, 11 / 3, 4, 3])
    assert running_mean([1, 2, 6], window=1).tolist() == [1, 2, 6]
    assert running_mean([4, 4, 4], window=9).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1_500_000, "1.5M"), (2e9, "2B"), (6e12, "6T")]
)
def test_short_count(value: float, text: str) -> None:
    assert short_count(value) == text


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for picture in pictures:
        schedule_figure(picture)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_loss_figure_draws_gaps_one_row_and_two_modalities(tmp_path: Path) -> None:
    gap = {"tokens": 20, "lr": 1e-3, "loss": math.nan, "loss/source/text": None}
    row = {"tokens": 10, "lr": 0.0, "loss": 2.0, "loss/source/caption": 8.0}
    row |= {"loss/modality/text": 2.0, "loss/modality/image": 5.0}
    evals = [{"tokens": 20, "loss/kind/caption": 1.0}]
    loss_figure([row, gap], evals=evals, path=tmp_path / "deep" / "loss.png")
    loss_figure([row], evals=[], path=tmp_path / "one.png")
    with Image.open(tmp_path / "deep" / "loss.png") as picture:
        assert picture.size == (1200, 900)
    assert (tmp_path / "one.png").stat().st_size > 0
