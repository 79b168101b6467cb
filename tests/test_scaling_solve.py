"""The solver: exact derivatives, straight valleys, and agreement with scipy's L-BFGS."""

import numpy as np
import pytest

from nmm.scaling import valleys
from nmm.scaling.bootstrap import refit
from nmm.scaling.fit import AnyLaw, Solver, fit_law, model_of
from nmm.scaling.floor import search
from nmm.scaling.laws import CHINCHILLA, EPOCH_GRID, INTERACTION, NMM_GRID, SPARSE, Grid, Law
from nmm.scaling.mixed import fit_pair, mean_alone
from nmm.scaling.mixtures import MixtureLaw
from nmm.scaling.points import Points
from nmm.scaling.powers import PowerModel
from nmm.scaling.repeated import RepeatedLaw
from nmm.scaling.smooth import SmoothModel
from nmm.scaling.solve import descend, minimise
from tests.scaling_cases import NMM, SIZES, SMALL_GRID, design, gemstone, planted
from tests.test_scaling_planted import BLENDED, DOMAINS, MIXED, mixtures

SPARSE_TRUTH = NMM | {"C": 0.4, "lambda": 0.25, "d": 250.0, "gamma": 0.31, "delta": 0.3}
REPEATED_TRUTH = NMM | {"R_D": 15.4, "R_N": 5.3}


def columns_of(law: AnyLaw) -> dict[str, np.ndarray]:
    if isinstance(law, MixtureLaw):
        return mixtures()
    values = {"N": SIZES, "D": np.geomspace(1e9, 1e12, 5), "keep": np.array([1, 0.5, 0.2])}
    values["U"] = np.array([2e9, 4e10])
    return design(**{name: values[name] for name in law.columns})


CASES: list[tuple[AnyLaw, dict[str, float]]] = [
    (CHINCHILLA, NMM),
    (SPARSE, SPARSE_TRUTH),
    (RepeatedLaw(), REPEATED_TRUTH),
    (MixtureLaw(DOMAINS), MIXED),
    (MixtureLaw(DOMAINS, joint=True), MIXED | BLENDED),
]


def setting(law: AnyLaw, truth: dict[str, float]) -> tuple[PowerModel | SmoothModel, np.ndarray]:
    """A model whose weights differ, and three places near the truth."""
    points = planted(law, truth, columns=columns_of(law), noise=0.01)
    weights = np.random.default_rng(1).uniform(0, 2, size=(2, len(points)))
    model = model_of(law, points, delta=0.01, weights=weights)
    theta = model.centred(law.theta(truth)) * np.array([[1], [1.01], [0.98]])
    return model, theta


@pytest.mark.parametrize(("law", "truth"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_derivatives_are_those_of_the_objective(law: AnyLaw, truth: dict[str, float]) -> None:
    """By central differences; the Hessian only where there is one."""
    model, theta = setting(law, truth)
    problems = np.array([0, 1, 0])
    found = model.evaluate(theta, problems=problems, exact=True)
    for place in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[:, place] = 1e-6
        up = model.evaluate(theta + step, problems=problems, exact=True)
        down = model.evaluate(theta - step, problems=problems, exact=True)
        slope = (up.objective - down.objective) / 2e-6
        assert found.gradient[:, place] == pytest.approx(slope, rel=1e-5, abs=1e-8)
        if isinstance(law, Law):
            curvature = (up.gradient - down.gradient) / 2e-6
            assert found.curvature[:, place] == pytest.approx(curvature, rel=1e-5, abs=1e-5)
    bound = model.evaluate(theta, problems=problems, exact=False)
    assert bound.objective.tolist() == found.objective.tolist()
    assert (np.linalg.eigvalsh(bound.curvature) > -1e-9).all()


@pytest.mark.parametrize(("law", "truth"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_printed_parameters_come_back(law: AnyLaw, truth: dict[str, float]) -> None:
    """Parameters, the vector and the coordinates of the search are one another's inverses."""
    theta = law.theta(truth)
    back = law.natural(theta)
    assert {name: float(back[name]) for name in truth} == pytest.approx(truth, rel=1e-12)
    model, _ = setting(law, truth)
    centred = model.centred(theta)[None]
    assert model.uncentred(centred)[0] == pytest.approx(theta, rel=1e-12)
    flat, jacobian = model.straighten(centred)
    bent, exists = model.bend(flat)
    assert exists.all()
    assert bent == pytest.approx(centred, rel=1e-9)
    step = 1e-7 * np.arange(1, theta.size + 1) * np.abs(flat)
    moved, _ = model.bend(flat + step)
    assert moved - centred == pytest.approx((jacobian @ step[:, :, None])[:, :, 0], rel=1e-4)


def test_a_term_that_lost_its_sign_does_not_exist() -> None:
    flat = np.array([[2.0, 0.1, 0.3], [2.0, -0.1, 0.3], [0.2, 0.1, 0.3]])
    theta, exists = valleys.bend(flat, firsts=[1], positive_constant=True)
    assert exists.tolist() == [True, False, False]  # a negative term, a negative constant
    assert theta[0] == pytest.approx([2 - 1 / 3, np.log(1 / 3), 0.3])
    assert valleys.bend(flat, firsts=[1], positive_constant=False)[1].tolist() == [
        True,
        False,
        True,
    ]


def test_steps_solve_the_system_and_go_down_where_it_is_not_positive() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(50, 5, 5))
    matrix, gradient = root @ root.transpose(0, 2, 1), rng.normal(size=(50, 5))
    damping = np.full(50, 0.1)
    step = descend(matrix, gradient, damping=damping)
    expected = np.linalg.solve(matrix + 0.1 * np.eye(5), -gradient[:, :, None])[:, :, 0]
    assert step == pytest.approx(expected, rel=1e-9)
    crooked = matrix - 3 * np.eye(5)
    assert (np.linalg.eigvalsh(crooked)[:, 0] < 0).all()
    assert ((descend(crooked, gradient, damping=damping) * gradient).sum(1) < 0).all()
    assert np.isfinite(descend(np.zeros((1, 5, 5)), gradient[:1], damping=np.zeros(1))).all()


def test_the_grids_are_those_of_the_papers() -> None:
    assert len(NMM_GRID.starts(CHINCHILLA)) == 1764
    assert len(EPOCH_GRID.starts(CHINCHILLA)) == 4500
    first = CHINCHILLA.natural(NMM_GRID.starts(CHINCHILLA)[0])
    assert first == {"E": np.exp(-1), "A": 1, "alpha": 0, "B": 1, "beta": 0}


def test_agrees_with_lbfgs() -> None:
    """The corners and middles of the paper's grid by both: one optimum, which more of ours find."""
    points = gemstone("slim_chinchilla")
    grid = Grid((0, 15, 30), (0, 0.5, 2.5), (-1, 1))
    ours = fit_law(CHINCHILLA, points, grid=grid)
    theirs = fit_law(CHINCHILLA, points, grid=grid, solver=Solver.lbfgs)
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-9)
    assert ours.objective <= theirs.objective * (1 + 1e-12)
    for name, value in ours.parameters.items():
        assert theirs.parameters[name] == pytest.approx(value, rel=1e-4), name
    assert theirs.starts.count == 162
    assert ours.starts.at_best_fraction > 2 * theirs.starts.at_best_fraction


@pytest.mark.parametrize(("law", "truth"), CASES[1:], ids=lambda case: getattr(case, "name", ""))
def test_other_laws_agree_with_lbfgs(law: AnyLaw, truth: dict[str, float]) -> None:
    """All starts by both: one optimum. Shares of the starts that find it are not compared."""
    points = planted(law, truth, columns=columns_of(law), noise=0.002)
    grid = Grid((0, 20), (0.1, 0.5), (-0.5, 0.5))
    ours = fit_law(law, points, grid=grid)
    theirs = fit_law(law, points, grid=grid, solver=Solver.lbfgs)
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-9)
    assert ours.starts.count == theirs.starts.count
    assert ours.starts.confirmed
    assert ours.predict(points.columns) == pytest.approx(theirs.predict(points.columns), rel=1e-5)


def test_pairs_agree_with_lbfgs() -> None:
    """Both laws alone, the interaction, whose constant may be negative, and the product form."""
    columns = design(N=SIZES, D=np.geomspace(5e9, 1e11, 4))
    alone = (
        planted(CHINCHILLA, NMM, columns=columns, noise=0.001),
        planted(CHINCHILLA, NMM | {"E": 2.5, "B": 400.0}, columns=columns, noise=0.001, seed=1),
    )
    both = {"N": columns["N"], "D_i": columns["D"] / 2, "D_j": columns["D"] / 2}
    for sign in (1, -1):
        interaction = {"C": 0.15 * sign, "A": 60.0, "alpha": 0.3, "B": 120.0, "beta": 0.28}
        mean = mean_alone((NMM, NMM | {"E": 2.5, "B": 400.0}), Points(both, np.ones(24)))
        loss = INTERACTION.predict(interaction, columns=columns, offset=mean)
        noise = 0.001 * np.random.default_rng(2).normal(size=24)
        together = Points(both, loss * np.exp(noise), tuple(str(i) for i in range(24)))
        grid = Grid((5, 10), (0.5,), (0.5,))
        ours = fit_pair(alone, together, grid=grid)
        theirs = fit_pair(alone, together, grid=grid, solver=Solver.lbfgs)
        for one, other in (
            (ours.together, theirs.together),
            (ours.product, theirs.product),
            *zip(ours.alone, theirs.alone, strict=True),
        ):
            assert one.objective == pytest.approx(other.objective, rel=1e-6)
            assert one.starts.confirmed
        assert ours.together.parameters == pytest.approx(theirs.together.parameters, rel=1e-2)
        assert np.sign(ours.together.parameters["C"]) == sign


def test_a_resample_takes_the_parameters_of_another_where_they_do_better() -> None:
    """One search is started where it cannot leave; the others' ends bring it out."""
    points = gemstone("slim_chinchilla")
    weights = np.random.default_rng(0).multinomial(28, np.full(28, 1 / 28), size=20).astype(float)
    model = model_of(CHINCHILLA, points, delta=1e-3, weights=weights)
    fit = fit_law(CHINCHILLA, points)
    starts = np.repeat(model.centred(fit.theta)[None], 20, axis=0)
    good = refit(model, starts.copy(), problems=np.arange(20))
    stuck = starts.copy()
    stuck[3] = [1e-9, -30.0, 20.0, -30.0, 20.0]
    alone = minimise(model, stuck[3:4], problems=np.array([3]))
    assert alone.objective[0] > 2 * good.objective[3]
    rescued = refit(model, stuck, problems=np.arange(20))
    assert rescued.objective == pytest.approx(good.objective, rel=1e-6)


@pytest.mark.parametrize("start", [0.5, 1e-3])
def test_losses_without_a_floor_end_at_one_minimum(start: float) -> None:
    """The lowest objective is at the end of E's range; and E comes up again where there is one."""
    columns = columns_of(CHINCHILLA)
    powers = planted(CHINCHILLA, {**NMM, "E": 0.0}, columns=columns, noise=0.01)
    tilted = Points(columns, powers.loss - 0.1 * powers.loss.min())  # steeper than any power
    grid = Grid((0, 15, 30), (0, 0.5, 2.5), (float(np.log(start)),))
    fit = fit_law(CHINCHILLA, tilted, grid=grid)
    assert fit.parameters["E"] < 1e-8
    assert not fit.has_floor(tilted)
    assert fit.gradient < 1e-7
    assert fit.starts.at_best_fraction > 0.3
    model = PowerModel(CHINCHILLA, columns=columns, loss=tilted.loss, delta=1e-3)
    best = model.centred(fit.theta)[None]
    slopes = model.evaluate(best, problems=np.zeros(1, dtype=int), exact=False)
    assert slopes.gradient[0, 0] > 0  # E would go below 0
    assert np.abs(slopes.gradient[0, 1:]).max() < 1e-7

    floor = planted(CHINCHILLA, NMM, columns=columns, noise=0)
    risen = search(
        PowerModel(CHINCHILLA, columns=columns, loss=floor.loss, delta=1e-3), np.array(best)
    )
    assert risen.theta[0, 0] == pytest.approx(NMM["E"], rel=1e-3)


def test_a_fit_that_others_do_not_confirm_says_so() -> None:
    points = planted(CHINCHILLA, NMM, columns=columns_of(CHINCHILLA), noise=0.01)
    assert fit_law(CHINCHILLA, points, grid=SMALL_GRID).starts.confirmed
    one = Grid((5,), (0.5,), (0.5,))
    alone = fit_law(CHINCHILLA, Points(points.columns, points.loss), grid=one)
    assert alone.starts.count == 1
    assert not alone.starts.confirmed
