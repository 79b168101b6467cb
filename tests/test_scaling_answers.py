"""Numbers that answer a study's questions, and what follows from their intervals."""

import math
from pathlib import Path

import numpy as np
import pytest

from nmm.errors import UserError
from nmm.scaling import estimates
from nmm.scaling.answers import (
    CANNOT_TELL,
    DOES_NOT,
    NO_NUMBER,
    REPORTED,
    REPRODUCES,
    Answer,
    answers_section,
    read_answers,
    verdict,
    write_answers,
)
from nmm.scaling.estimates import Estimate
from nmm.scaling.files import Written
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.phenomena import BestBatch
from tests.scaling_cases import NMM

ABOVE_ZERO = (0.0, math.inf)


@pytest.mark.parametrize(
    ("low", "high", "claim", "expected"),
    [
        (0.1, 0.3, ABOVE_ZERO, REPRODUCES),
        (-0.3, -0.1, ABOVE_ZERO, DOES_NOT),
        (-0.1, 0.3, ABOVE_ZERO, CANNOT_TELL),
        (-math.inf, math.inf, ABOVE_ZERO, CANNOT_TELL),
        (0.5, 0.55, (0.4, 0.6), REPRODUCES),
        (0.3, 0.5, (0.4, 0.6), CANNOT_TELL),
        (0.3, 0.7, (0.4, 0.6), CANNOT_TELL),
        (0.7, 0.8, (0.4, 0.6), DOES_NOT),
        (0.1, 0.3, None, REPORTED),
    ],
)
def test_the_interval_decides(
    low: float, high: float, claim: tuple[float, float] | None, expected: str
) -> None:
    assert verdict(Estimate(0.0, low, high, ""), claim=claim) == expected


def test_a_mean_over_sizes_counts_sizes_and_not_runs() -> None:
    """Two sizes of means 1 and 2: 1.5 and t(0.975, 1) = 12.706 times 0.5 to either side."""
    found = estimates.mean_of({"a": [0.5, 1.5], "b": [2.0, 2.0, 2.0]})
    assert found is not None
    assert found.value == 1.5
    assert found.high - 1.5 == pytest.approx(12.706 * 0.5, abs=1e-3)
    assert 1.5 - found.low == pytest.approx(found.high - 1.5)
    alone = estimates.mean_of({"a": [1.0, 3.0]})
    assert alone is not None
    assert (alone.value, alone.low, alone.high) == (2.0, -math.inf, math.inf)
    assert estimates.mean_of({"a": []}) is None
    ratio = estimates.ratio_of({"a": [2.0], "b": [8.0]})
    assert ratio is not None
    assert ratio.value == pytest.approx(4.0)
    assert ratio.low * ratio.high == pytest.approx(16.0)


def test_intervals_of_means_hold_the_truth_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        sizes = {
            str(size): (0.1 + rng.normal(0, 0.05) + rng.normal(0, 0.01, 4)) for size in range(4)
        }
        found = estimates.mean_of(sizes)
        assert found is not None
        held += found.low <= 0.1 <= found.high
    assert 0.93 < held / 2000 < 0.97


def law(shift: float, *, flops: tuple[float, float], spread: float = 0.001) -> Written:
    """A fit whose E is higher by `shift`, with resamples of E alone."""
    columns = {"N": np.geomspace(1e8, 1e9, 6)}
    columns["C"] = np.geomspace(*flops, 6)
    columns["D"] = columns["C"] / 6 / columns["N"]
    parameters = {**NMM, "E": NMM["E"] + shift}
    loss = CHINCHILLA.predict(parameters, columns=columns)
    unseen = np.where(np.arange(6) < 4, np.nan, loss * np.array([1, 1, 1, 1, 1.01, 0.97]))
    deviations = np.linspace(-1, 1, 101) * spread
    resamples = {name: np.full(101, value) for name, value in parameters.items()}
    resamples["E"] = resamples["E"] + deviations
    accounting = {"saved": 0.0, "slope": 0.0, "intercept": 0.0}
    record = {"parameters": parameters, "accounting": accounting, "agreement": {"confirmed": True}}
    return Written("loss", record, resamples, {**columns, "L": loss, "predicted_unseen": unseen})


def test_frontiers_are_compared_at_flops_that_both_have() -> None:
    lower, higher = law(0, flops=(1e19, 1e21)), law(0.05, flops=(3e19, 1e22))
    for at_most, flops in ((False, "3e+19"), (True, "1e+21")):
        found = estimates.frontier_gap(lower, higher, at_most=at_most)
        assert found is not None
        assert found.value == pytest.approx(0.05, abs=1e-9)
        assert (found.low, found.high) == pytest.approx((0.05, 0.05), abs=1e-9)  # both move alike
        assert flops in found.how
    other = law(0.05, flops=(3e19, 1e22), spread=-0.002)
    found = estimates.frontier_gap(lower, other, at_most=True)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.05 - 0.00285, 0.05 + 0.00285), abs=1e-5)
    assert "extrapolated" in found.how  # to fewer tokens than any of its runs has seen
    longer = [law(shift, flops=(3e19, 1e20)) for shift in (0, 0.05)]
    found = estimates.frontier_gap(longer[0], longer[1], at_most=True)
    assert found is not None
    assert "extrapolated" not in found.how
    assert estimates.frontier_gap(lower, law(0, flops=(1e22, 1e23)), at_most=True) is None
    other.record["agreement"]["confirmed"] = False
    found = estimates.frontier_gap(lower, other, at_most=True)
    assert found is not None
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_what_a_law_misses_is_of_the_points_it_had_not_seen() -> None:
    fitted = law(0, flops=(1e19, 1e21))
    found = estimates.prediction_error(fitted)
    assert found is not None
    assert found.value == pytest.approx(2.0)  # of 1 % and 3 %
    assert found.low == 0.0
    assert found.high < math.inf
    fitted.points["N"][np.isfinite(fitted.points["predicted_unseen"])] = 1e9
    alone = estimates.prediction_error(fitted)
    assert alone is not None
    assert (alone.value, alone.low, alone.high) == (found.value, 0.0, math.inf)


def test_what_two_modalities_gain_has_an_interval_if_others_found_its_laws() -> None:
    confirmed = {"agreement": {"confirmed": True}, "alone": [{"agreement": {"confirmed": True}}]}
    gains = {"small": [0.1], "large": [0.3]}
    found = estimates.interaction(confirmed, gains)
    assert found == estimates.mean_of(gains)
    confirmed["alone"] = [{"agreement": {"confirmed": False}}]
    doubtful = estimates.interaction(confirmed, gains)
    assert doubtful is not None
    assert (doubtful.low, doubtful.high) == (-math.inf, math.inf)


def test_layers_are_compared_with_those_between() -> None:
    assert estimates.layer_contrasts([0.5, 0.1, 0.3, 0.25]) == pytest.approx((0.3, 0.05))
    assert estimates.layer_contrasts([0.5, 0.1]) is None


def test_a_scan_of_batches_says_its_range_when_one_is_left_out() -> None:
    batches = (1e3, 2e3, 4e3, 8e3)
    losses = tuple(3 + (math.log(batch) - math.log(3e3)) ** 2 for batch in batches)
    found = estimates.best_batch(BestBatch(1, 1, batches, losses, best_tokens=3e3))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((3e3, 3e3))
    noisy = (3.0, 2.0, 2.4, 3.0)
    found = estimates.best_batch(BestBatch(1, 1, batches, noisy, best_tokens=3e3))
    assert found is not None
    assert found.low < 3e3 < found.high
    assert estimates.best_batch(BestBatch(1, 1, batches, noisy, best_tokens=None)) is None


def test_answers_come_back_as_they_were_written(tmp_path: Path) -> None:
    found = [
        Answer("is it <better>", "gap", Estimate(0.2, 0.1, math.inf, "4 sizes"), ABOVE_ZERO, "yes"),
        Answer("the other", "gap", None, (-0.1, 0.1), why_not="no law"),
        Answer("how much", "eta", Estimate(2, -math.inf, math.inf, "one size")),
        Answer("how many", "batch", None, why_not="no runs"),
    ]
    write_answers(found, study="ours", out=tmp_path)
    assert read_answers(tmp_path) == found
    assert [one.verdict for one in found] == [REPRODUCES, CANNOT_TELL, REPORTED, NO_NUMBER]
    lines = (tmp_path / "answers.md").read_text().splitlines()
    assert lines[2] == (
        "| is it <better> | 0.2 | above 0.1 | above 0 | reproduces | yes | gap | 4 sizes |"
    )
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 1 + len(found)
    section = answers_section("ours", found)
    assert "is it &lt;better&gt;" in section.html
    assert [row["value"] for row in section.rows] == [0.2, 2]
    (tmp_path / "answers.json").write_text("{}")
    with pytest.raises(UserError, match=r"no readable answers\.json"):
        read_answers(tmp_path)
