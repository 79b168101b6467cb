"""The schedule as tables: lengths, phases, rates, published check values, refusals."""

from dataclasses import replace
from math import inf, nextafter, sqrt

import pytest
from omegaconf import OmegaConf

from nmm.config import Cooldown, ScheduleConfig
from nmm.errors import UserError
from nmm.schedule import Phases, cooldown_factor, default_warmup, learning_rate, phase_name, phases


def lengths(tokens_per_step: int = 10, **values: object) -> tuple[int, int, int]:
    found = phases(ScheduleConfig(**values), tokens_per_step=tokens_per_step)
    return found.warmup_steps, found.constant_steps, found.cooldown_steps


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"total_steps": 12, "warmup_steps": 0}, (0, 10, 2)),
        ({"total_steps": 130, "warmup_steps": 10}, (10, 100, 20)),
        ({"total_steps": 131, "warmup_steps": 10}, (10, 101, 20)),
        ({"total_steps": 100}, (10, 75, 15)),
        ({"total_steps": 1}, (0, 1, 0)),
        ({"total_tokens": 1000}, (10, 75, 15)),
        ({"total_tokens": 991}, (10, 75, 15)),
        ({"total_tokens": 1000, "warmup_tokens": 59, "cooldown_tokens": 209}, (5, 75, 20)),
        ({"total_tokens": 105, "warmup_tokens": 12, "cooldown_tokens": 93}, (1, 1, 9)),
        ({"total_steps": 50, "warmup_steps": 10, "cooldown_steps": 40}, (10, 0, 40)),
        ({"total_steps": 50, "warmup_tokens": 100, "cooldown_tokens": 400}, (10, 0, 40)),
        ({"total_steps": 50, "warmup_steps": 10, "cooldown_fraction": None}, (10, 0, 40)),
        ({"total_steps": 50, "warmup_steps": 10, "cooldown_fraction": 0.0}, (10, 40, 0)),
        ({"total_steps": 50, "warmup_steps": 10, "cooldown_fraction": 1.0}, (10, 20, 20)),
        ({"total_steps": 50, "warmup_steps": 50}, (50, 0, 0)),
        ({"total_steps": 50, "warmup_steps": 0, "cooldown_steps": 50}, (0, 0, 50)),
        (
            {"total_steps": 160_000, "warmup_steps": 4000, "cooldown_fraction": None},
            (4000, 0, 156_000),
        ),
    ],
)
def test_lengths(values: dict, expected: tuple[int, int, int]) -> None:
    assert lengths(**values) == expected


def test_default_cooldown_is_a_fifth_of_the_constant_phase_at_every_length() -> None:
    for total in range(1, 3000):
        found = phases(ScheduleConfig(total_steps=total, warmup_steps=0), tokens_per_step=1)
        assert found.total_steps == total
        assert found.cooldown_steps == total // 6


@pytest.mark.parametrize(
    ("total", "warmup"),
    [
        *[(9, 0), (10, 1), (999, 99), (1000, 500), (2000, 1000), (4000, 1000), (4999, 1000)],
        *[(5000, 2500), (15_000, 2500), (15_001, 5000), (160_000, 5000)],
    ],
)
def test_default_warmup(total: int, warmup: int) -> None:
    assert default_warmup(total) == warmup


@pytest.mark.parametrize(
    ("total", "warmup"), [(999, 99), (1000, 500), (5001, 2500), (19_999, 2500), (20_000, 5000)]
)
def test_longer_warmup_of_sparse_models(total: int, warmup: int) -> None:
    assert default_warmup(total, longer=True) == warmup
    assert lengths(total_steps=total, longer_warmup=True)[0] == warmup


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (
            {"total_steps": 10, "warmup_steps": 6, "cooldown_steps": 5},
            (
                "schedule.warmup_steps is 6",
                "schedule.cooldown_steps is 5",
                "schedule.total_steps is 10",
            ),
        ),
        (
            {"total_tokens": 95, "warmup_tokens": 110},
            ("schedule.warmup_steps is 11", "total_steps is 10"),
        ),
        ({"total_steps": 10, "warmup_tokens": 9}, ("schedule.warmup_tokens is 9", "10 tokens")),
        ({"total_steps": 10, "cooldown_tokens": 9}, ("schedule.cooldown_tokens is 9", "10 tokens")),
    ],
)
def test_lengths_that_do_not_fit_are_refused(values: dict, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        lengths(**values)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"total_tokens": 1, "total_steps": 1}, "schedule.total_steps is 1"),
        ({"total_steps": 1, "warmup_steps": 1, "warmup_tokens": 1}, "schedule.warmup_tokens is 1"),
        ({"total_steps": 0}, "schedule.total_steps is 0"),
        ({"total_steps": 1, "warmup_steps": -1}, "schedule.warmup_steps is -1"),
        ({"total_steps": 1, "cooldown_fraction": inf}, "schedule.cooldown_fraction is inf"),
        ({"total_steps": 1, "min_fraction": 2.0}, "schedule.min_fraction is 2.0"),
        ({"total_steps": 1, "cooldown": Cooldown.exponential}, "schedule.min_fraction is 0"),
        (
            {"total_steps": 1, "cooldown": Cooldown.inverse_sqrt_published},
            "schedule.min_fraction is 0",
        ),
    ],
)
def test_bad_values_are_refused_with_their_key(values: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        ScheduleConfig(**values)


def test_rates_and_phases_of_a_whole_run() -> None:
    config = ScheduleConfig(total_steps=13, cooldown=Cooldown.linear, min_fraction=0.1)
    plan = Phases(warmup_steps=4, constant_steps=4, cooldown_steps=5)
    rates = [learning_rate(config, phases=plan, peak=2.0, step=step) for step in range(1, 14)]
    cooled = [1.64, 1.28, 0.92, 0.56, 0.2]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0] + 4 * [2.0] + cooled, rel=1e-15)
    names = [phase_name(plan, step=step) for step in range(1, 14)]
    assert names == 4 * ["warmup"] + 4 * ["constant"] + 5 * ["cooldown"]


@pytest.mark.parametrize("step", [0, 14])
def test_a_step_outside_the_run_is_our_own_mistake(step: int) -> None:
    with pytest.raises(AssertionError):
        phase_name(Phases(4, 4, 5), step=step)


def shape(cooldown: Cooldown, minimum: float = 0.0, steepness: float = 15.0) -> ScheduleConfig:
    return ScheduleConfig(
        total_steps=1, cooldown=cooldown, min_fraction=minimum, cooldown_steepness=steepness
    )


@pytest.mark.parametrize(
    ("config", "table"),
    [
        # Steepness 15 has roots at perfect squares: g = 1/2 at t = 1/5, g = 1/4 at t = 1.
        (shape(Cooldown.inverse_sqrt), {0: 1, 0.2: 1 / 3, 1: 0}),
        (shape(Cooldown.inverse_sqrt, minimum=0.1), {0: 1, 0.2: 0.4, 1: 0.1}),
        (shape(Cooldown.inverse_sqrt, steepness=3), {0: 1, 5 / 12: 1 / 3, 1: 0}),
        (shape(Cooldown.one_minus_sqrt), {0: 1, 0.01: 0.9, 0.25: 0.5, 0.64: 0.2, 1: 0}),
        (shape(Cooldown.one_minus_sqrt, minimum=0.5), {0: 1, 0.25: 0.75, 1: 0.5}),
        (shape(Cooldown.linear), {0: 1, 0.25: 0.75, 1: 0}),
        (shape(Cooldown.exponential, minimum=0.01), {0: 1, 0.5: 0.1, 1: 0.01}),
        (shape(Cooldown.inverse_sqrt_published, minimum=0.5), {0: 1, 0.25: sqrt(4 / 7), 1: 0.5}),
    ],
)
def test_shapes(config: ScheduleConfig, table: dict[float, float]) -> None:
    for time, factor in table.items():
        assert cooldown_factor(config, time=time) == pytest.approx(factor, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (shape(Cooldown.inverse_sqrt_published, minimum=1e-2), {0.001: 0.30, 0.01: 0.10}),
        (shape(Cooldown.inverse_sqrt_published, minimum=1e-3), {0.001: 0.03}),
        (shape(Cooldown.one_minus_sqrt), {0.01: 0.90, 0.10: 0.68, 0.25: 0.50, 0.50: 0.29, 1.0: 0}),
    ],
)
def test_published_check_values(config: ScheduleConfig, table: dict[float, float]) -> None:
    assert {time: round(cooldown_factor(config, time=time), 2) for time in table} == table


def test_published_form_is_the_inverse_power_of_the_authors() -> None:
    for minimum in (1e-3, 1e-2, 0.25, 0.9):
        offset = 1 / (minimum**-2 - 1)
        for time in (0.0, 0.001, 0.3, 0.999):
            published = (offset + time) ** -0.5 / offset**-0.5
            ours = cooldown_factor(shape(Cooldown.inverse_sqrt_published, minimum), time=time)
            assert ours == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("cooldown", list(Cooldown))
@pytest.mark.parametrize("minimum", [1e-3, 0.1, 1.0])
def test_every_shape_falls_from_the_peak_to_exactly_the_minimum(
    cooldown: Cooldown, minimum: float
) -> None:
    config = shape(cooldown, minimum)
    factors = [cooldown_factor(config, time=step / 1000) for step in range(1001)]
    assert factors[0] == 1
    assert factors[-1] == minimum
    assert factors == sorted(factors, reverse=True)
    assert len(set(factors)) == (1 if minimum == 1 else 1001)
    plan = Phases(0, 1, 7)
    assert learning_rate(config, phases=plan, peak=3e-4, step=8) == 3e-4 * minimum
    assert learning_rate(config, phases=plan, peak=3e-4, step=1) == 3e-4


def test_the_default_shape_ends_at_zero_and_a_vanishing_steepness_is_linear() -> None:
    config = shape(Cooldown.inverse_sqrt)
    assert cooldown_factor(config, time=nextafter(1.0, 0.0)) > 0
    assert cooldown_factor(config, time=1.0) == 0
    assert cooldown_factor(replace(config, cooldown_steepness=1e-20), time=0.3) == pytest.approx(
        0.7
    )


@pytest.mark.parametrize("name", ["nmm", "nmm_published", "moma", "chameleon"])
def test_presets_fit_a_run(name: str) -> None:
    preset = OmegaConf.merge(
        OmegaConf.structured(ScheduleConfig(total_steps=8000)),
        OmegaConf.load(f"conf/schedule/{name}.yaml"),
    )
    config = OmegaConf.to_object(preset)
    assert isinstance(config, ScheduleConfig)
    plan = phases(config, tokens_per_step=1)
    last = learning_rate(config, phases=plan, peak=1.0, step=8000)
    assert plan.total_steps == 8000
    assert last == config.min_fraction
