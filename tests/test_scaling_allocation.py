"""Splitting compute: the closed form, its numeric twin, the paper's regression, frontiers."""

import numpy as np
import pytest

from nmm.errors import UserError
from nmm.scaling import holdout
from nmm.scaling.allocation import (
    Accounting,
    closed_form,
    frontier_exponent,
    late_fusion,
    numeric_optimum,
    optimum,
    regression,
)
from nmm.scaling.frontier import frontier, interpolated, isoflop, lower_hull
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.metrics import agreement
from nmm.scaling.mixed import barrier, is_distinct
from nmm.scaling.mixtures import SHARE, MixtureLaw, best_shares
from nmm.scaling.points import Points
from nmm.scaling.repeated import RepeatedLaw, effective
from nmm.scaling.words import no_barrier
from tests.scaling_cases import NMM, SIZES, design, planted
from tests.test_scaling_planted import BLENDED, DOMAINS, MIXED

MOE = {"E": 2.158, "A": 381773.0, "B": 4659.0, "alpha": 0.710, "beta": 0.372}  # table 12
FLOPS = np.geomspace(1e18, 1e24, 13)


@pytest.mark.parametrize("law", [NMM, MOE], ids=["dense", "sparse"])
def test_closed_form_is_the_numeric_optimum(law: dict[str, float]) -> None:
    size, tokens = optimum(law, flops=FLOPS)
    found = numeric_optimum(law, flops=FLOPS, accounting=Accounting())
    assert found[0] == pytest.approx(size, rel=1e-6)
    assert found[1] == pytest.approx(tokens, rel=1e-6)
    assert 6 * size * tokens == pytest.approx(FLOPS, rel=1e-12)
    for factor in (0.99, 1.01):  # and both are lowest: any other split loses
        moved = {"N": size * factor, "D": tokens / factor}
        best = CHINCHILLA.predict(law, columns={"N": size, "D": tokens})
        assert (CHINCHILLA.predict(law, columns=moved) > best).all()


def test_exponents_of_the_paper() -> None:
    """arXiv 2504.07951, tables 2, 9 and 12, by the closed form from the printed alpha and beta."""
    dense, sparse = closed_form(NMM), closed_form(MOE)
    assert dense["a"] == pytest.approx(0.5262, abs=1e-3)
    assert dense["b"] == pytest.approx(0.473, abs=1e-3)
    assert dense["d"] == pytest.approx(0.8987, abs=5e-3)
    assert closed_form(MOE)["d"] == pytest.approx(1.909, abs=1e-3)  # 1.797 by its regression
    assert dense["b"] - dense["a"] == pytest.approx(-0.053, abs=1e-3)
    assert sparse["a"] == pytest.approx(0.344, abs=5e-4)  # the paper's regression: .361
    sizes, tokens = optimum(MOE, flops=np.array([1e20, 1e21, 1e22]))
    assert sizes == pytest.approx([0.43e9, 0.96e9, 2.1e9], rel=0.02)
    assert tokens == pytest.approx([38e9, 174e9, 790e9], rel=0.02)


def test_frontier_values_of_the_paper() -> None:
    """k C^c of its figures 26 to 28 at 1e19 to 1e22, and coefficients that reproduce them."""
    compute = np.array([1e19, 1e20, 1e21, 1e22])
    printed = {
        (29.574, -0.0492): [3.436, 3.068, 2.740, 2.446],
        (29.923, -0.0494): [3.447, 3.076, 2.745, 2.450],
        (27.086, -0.048): [3.317, 2.970, 2.659, 2.381],
        (26.287, -0.047): [3.363, 3.018, 2.709, 2.431],
    }
    for (k, c), expected in printed.items():
        points = frontier(flops=compute, loss=k * compute**c)
        assert (points.k, points.c) == (pytest.approx(k, rel=1e-9), pytest.approx(c, rel=1e-9))
        assert points.predict(compute) == pytest.approx(expected, abs=5e-4)
    size, tokens = optimum(NMM, flops=compute[1:])
    losses = CHINCHILLA.predict(NMM, columns={"N": size, "D": tokens})
    assert losses == pytest.approx([3.068, 2.740, 2.446], abs=0.03)
    assert frontier_exponent(NMM_ARRAYS, flops=(3e19, 1e22)) == pytest.approx(-0.0492, abs=2e-3)


NMM_ARRAYS = {name: np.asarray(value) for name, value in NMM.items()}


@pytest.mark.parametrize(("spaced", "error"), [("log", 2e-3), ("linear", 6e-3)])
def test_regression_finds_the_closed_form(spaced: str, error: float) -> None:
    """D from 10 to 600 billion, as in the paper; C whose best D lies outside are left out.

    Linear spacing is coarse at its low end, which moves d by 0.005.
    """
    found = regression(
        NMM, flops=FLOPS, tokens=(10e9, 600e9), accounting=Accounting(), spaced=spaced
    )
    expected = closed_form(NMM)
    assert found is not None
    assert (found.a, found.b, found.d) == pytest.approx(
        (expected["a"], expected["b"], expected["d"]), abs=error
    )
    assert found.points + found.edge == len(FLOPS)
    assert found.edge == sum(not 10e9 < tokens < 600e9 for tokens in optimum(NMM, flops=FLOPS)[1])
    one = regression(NMM, flops=FLOPS[:1], tokens=(10e9, 600e9), accounting=Accounting())
    assert one is None


def test_late_fusion_counts_the_encoder_on_its_own_tokens() -> None:
    """Sizes of table 6, D_v = 0.544 D: 6 (N_v D_v + N_t D), and back from C to N."""
    vision = np.array([42.5, 81.8, 169.9, 308.3, 418.3, 679.5]) * 1e6
    text = np.array([247.3, 411.6, 834.4, 1439.7, 2012.2, 3027.8]) * 1e6
    size, tokens = vision + text, np.full(6, 1e11)
    rule = late_fusion(size=size, vision=vision, tokens=tokens, vision_tokens=0.544 * tokens)
    assert rule.saved == pytest.approx(0.456)
    fitted = rule.intercept + rule.slope * size
    expected = 6 * (fitted * 0.544 * tokens + (size - fitted) * tokens)
    spent = rule.flops(size=size, tokens=tokens)
    assert spent == pytest.approx(expected, rel=1e-12)
    assert spent == pytest.approx(6 * (vision * 0.544 + text) * tokens, rel=0.02)
    assert rule.size(flops=spent, tokens=tokens) == pytest.approx(size, rel=1e-12)
    assert rule.tokens(flops=spent, size=size) == pytest.approx(tokens, rel=1e-12)
    best, budget = numeric_optimum(NMM, flops=FLOPS, accounting=rule)
    losses = CHINCHILLA.predict(NMM, columns={"N": best, "D": budget})
    for factor in (0.98, 1.02):
        other = rule.tokens(flops=FLOPS, size=best * factor)
        moved = CHINCHILLA.predict(NMM, columns={"N": best * factor, "D": other})
        assert (moved > losses).all()


def test_hull_and_parabolas() -> None:
    """A square's lower side; parabolas of a law with alpha = beta are symmetric and unbiased."""
    square = np.array([[0, 1.0], [0, 0], [1, 0], [1, 1], [0.5, 0.2], [2, 5]])
    assert lower_hull(square).tolist() == [[0, 0]]
    slope = np.array([[0, 3.0], [1, 1], [2, 0.5], [1, 2], [3, 4]])
    assert lower_hull(slope).tolist() == [[0, 3], [1, 1], [2, 0.5]]
    even = {"E": 2.0, "A": 1000.0, "B": 1000.0, "alpha": 0.3, "beta": 0.3}
    flops, around = np.array([1e19, 1e20, 1e21]), np.geomspace(0.5, 2, 7)
    size = (optimum(even, flops=flops)[0][:, None] * around).ravel()
    spent = np.repeat(flops, 7)
    loss = CHINCHILLA.predict(even, columns={"N": size, "D": spent / 6 / size})
    parabolas, a = isoflop(flops=spent, loss=loss, size=size)
    assert a == pytest.approx(0.5, abs=1e-9)
    assert [p.size for p in parabolas] == pytest.approx(optimum(even, flops=flops)[0], rel=1e-9)
    assert isoflop(flops=spent[:7], loss=loss[:7], size=size[:7])[1] is None
    assert isoflop(flops=spent, loss=-loss, size=size) == ([], None)
    with pytest.raises(UserError, match="lower --min-flops"):
        frontier(flops=spent, loss=loss, least_flops=1e23)


def test_curves_of_sizes_replace_missing_isoflop_runs() -> None:
    columns = design(N=SIZES, D=np.geomspace(1e9, 6e11, 30))
    loss = CHINCHILLA.predict(NMM, columns=columns)
    flops = 6 * columns["N"] * columns["D"]
    levels, losses, sizes = interpolated(flops=flops, loss=loss, size=columns["N"])
    exact = CHINCHILLA.predict(NMM, columns={"N": sizes, "D": levels / 6 / sizes})
    assert losses == pytest.approx(exact, rel=3e-4)
    _, a = isoflop(flops=levels, loss=losses, size=sizes)
    assert a == pytest.approx(closed_form(NMM)["a"], abs=0.03)


def test_metrics_by_hand() -> None:
    found = agreement(np.array([1.0, 2.0, 4.0]), measured=np.array([1.0, 2.5, 4.0]))
    assert found["mse"] == pytest.approx(0.25 / 3)
    assert found["mae_percent"] == pytest.approx(100 * 0.2 / 3)
    assert found["r2"] == pytest.approx(1 - 0.25 / 4.5)
    assert agreement(np.ones(2), measured=np.ones(2))["r2"] is None


def test_barrier_is_the_cheapest_point_of_equality() -> None:
    """Closed form against a fine scan of the equality; none where C is not positive,
    or where it is no number.
    """
    interaction = {"C": 0.15, "A": 60.0, "alpha": 0.30, "B": 120.0, "beta": 0.28}
    cheapest = barrier(interaction)
    assert cheapest is not None
    parts = np.linspace(1e-4, 1 - 1e-4, 200_001) * 0.15
    size = (60.0 / parts) ** (1 / 0.30)
    tokens = (120.0 / (0.15 - parts)) ** (1 / 0.28)
    assert cheapest.flops == pytest.approx((6 * size * tokens).min(), rel=1e-6)
    left = 60.0 * cheapest.size**-0.30 + 120.0 * cheapest.tokens**-0.28
    assert left == pytest.approx(0.15, rel=1e-12)
    for changed, reason in (
        ({"C": 0.0}, "no synergy at any scale"),
        ({"C": -0.1}, "no synergy at any scale"),
        ({"alpha": 1e-3}, "the barrier lies beyond the largest number"),
    ):
        assert barrier(interaction | changed) is None
        assert no_barrier({"parameters": interaction | changed}).startswith(reason)


def test_distinct_modalities() -> None:
    assert is_distinct(loss_across=np.log(40), loss_own=np.log(10))
    assert not is_distinct(loss_across=np.log(29), loss_own=np.log(10))
    assert is_distinct(loss_across=np.log(29), loss_own=np.log(10), sigma=2)


@pytest.mark.parametrize("joint", [False, True], ids=["additive", "joint"])
def test_best_shares_beat_every_other(joint: bool) -> None:
    """Against a scan of the simplex; for two targets at once and for one alone."""
    law = MixtureLaw(DOMAINS, joint=joint)
    first = MIXED | (BLENDED if joint else {})
    second = first | {"C_caption": 0.3, "C_text": 1.4}
    grid = np.array([(i, j, 50 - i - j) for i in range(51) for j in range(51 - i)]) / 50
    columns = {SHARE + name: grid[:, place] for place, name in enumerate(DOMAINS)}
    columns |= {"N": np.full(len(grid), 1e9), "D": np.full(len(grid), 1e11)}
    losses = [law.predict(truth, columns=columns) for truth in (first, second)]
    for laws, scanned in (([first], losses[0]), ([first, second], (losses[0] + losses[1]) / 2)):
        shares, loss = best_shares([(law, truth) for truth in laws], size=1e9, tokens=1e11)
        assert sum(shares.values()) == pytest.approx(1)
        assert loss <= scanned.min() + 1e-9
        assert list(shares.values()) == pytest.approx(grid[scanned.argmin()], abs=0.03)


def test_the_authors_own_values_of_repeated_tokens() -> None:
    """Losses that the authors of arXiv 2305.16264 print for their parameters, all digits."""
    logs = {"A": 6.255414, "B": 7.3049974, "E": 0.6254804}
    published = {name: float(np.exp(value)) for name, value in logs.items()}
    published |= {"alpha": 0.3526596, "beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743}
    columns = {
        "N": np.array([6.34e9, 8.67e9]),
        "D": np.array([242e9, 178e9]),
        "U": np.array([25e9, 25e9]),
    }
    losses = RepeatedLaw().predict(published, columns=columns)
    assert losses == pytest.approx([2.2256440889984477, 2.2269634075087867], rel=1e-12)


def test_additive_mixtures_do_not_depend_on_scale() -> None:
    """The additive law's best shares are the same at any N and D; the joint law's are not."""
    for joint in (False, True):
        law = MixtureLaw(DOMAINS, joint=joint)
        truth = MIXED | (BLENDED if joint else {})
        found = [
            list(best_shares([(law, truth)], size=size, tokens=tokens)[0].values())
            for size, tokens in ((1e8, 1e9), (1e10, 1e12))
        ]
        moved = np.abs(np.subtract(*found)).max()
        assert moved > 0.02 if joint else moved < 1e-4


def test_repeated_tokens_are_worth_less() -> None:
    """One pass is worth itself, the next almost; thousands approach unique * (1 + R)."""
    unique = np.full(4, 1e10)
    passes = np.array([1.0, 2.0, 4.0, 1e6])
    worth, _, _ = effective(unique * passes, unique=unique, log_star=np.log([[15.4]]))
    assert worth[0, 0] == pytest.approx(1e10)
    assert worth[0, 1] / 2e10 == pytest.approx(1, abs=0.02)
    assert worth[0, 2] / 4e10 == pytest.approx(1, abs=0.08)
    assert worth[0, 3] == pytest.approx(16.4e10)
    truth = NMM | {"R_D": 15.4, "R_N": 5.3}
    columns = {"N": np.array([1e8]), "D": np.array([2e10]), "U": np.array([2e10])}
    fresh = RepeatedLaw().predict(truth, columns=columns)
    assert fresh == pytest.approx(CHINCHILLA.predict(NMM, columns=columns), rel=1e-9)


def test_held_out_points_and_the_ruler() -> None:
    """A law with a floor is beaten by no ruler beyond the data; a plane in the logs is, exactly."""
    columns = design(N=SIZES, D=np.geomspace(2.5e9, 6e11, 8))
    points = planted(CHINCHILLA, NMM, columns=columns, noise=0.0)
    split = holdout.largest(points)
    assert split is not None
    assert split.rule == "N>=3.35e+09"
    assert split.held_out.sum() == 8
    found = holdout.verdict(
        CHINCHILLA.predict(NMM, columns=points.select(split.held_out).columns),
        points=points,
        split=split,
    )
    assert found["metrics"]["mse"] < 1e-20 < 1e-5 < found["naive_metrics"]["mse"]
    plane = Points(columns, 30 * columns["N"] ** -0.05 * columns["D"] ** -0.03, points.names)
    assert holdout.ruler(plane, columns=columns) == pytest.approx(plane.loss, rel=1e-9)
    rule = holdout.by_rule(points, rule="N>2e9, D<=1e10")
    assert rule.held_out.tolist() == ((columns["N"] > 2e9) & (columns["D"] <= 1e10)).tolist()
    one_size = points.select(columns["N"] == SIZES[0])
    assert holdout.largest(one_size) is None
    for wrong in ("N=3", "size>3", "N>1e99", "N>0", "N>e", ""):
        with pytest.raises(UserError, match="--holdout"):
            holdout.by_rule(points, rule=wrong)
