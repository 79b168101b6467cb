"""Hand-made curves give back what was planted in them: pauses, alternations, spikes, batches."""

import json
from pathlib import Path

import numpy as np
import pytest

from nmm.errors import UserError
from nmm.log import JsonLog
from nmm.scaling.__main__ import main
from nmm.scaling.phenomena import (
    Settings,
    alternations,
    best_batches,
    correlation,
    drops,
    dynamics,
    ranks,
    spikes,
)
from nmm.scaling.runs import read_runs
from tests.test_scaling_runs import write_run

PAIR = ("text", "image")


def taking_turns(*, turns: int, rows: int = 100) -> list[dict]:
    """Text learns while image pauses, then the other way round, `turns` times `rows` rows."""
    steps = np.arange(turns * rows)
    learning = (steps // rows) % 2 == 0
    text = 5 - np.cumsum(learning) * 0.002
    image = 6 - np.cumsum(~learning) * 0.003
    return [
        {"step": step + 1, "loss/modality/text": a, "loss/modality/image": b, "grad_norm": 1.0}
        for step, (a, b) in enumerate(zip(text.tolist(), image.tolist(), strict=True))
    ]


def test_modalities_that_take_turns() -> None:
    found = dynamics(taking_turns(turns=6), pair=PAIR, settings=Settings(window_rows=50))
    assert found.windows == 12
    assert found.paused_fraction == (0.5, 0.5)  # of text, of image
    assert found.alternations == 5
    assert found.spikes == 0
    both = [
        {**row, "loss/modality/image": row["loss/modality/text"]} for row in taking_turns(turns=1)
    ]
    smooth = dynamics(both, pair=PAIR, settings=Settings(window_rows=50))
    assert smooth.paused_fraction == (0.0, 0.0)
    assert smooth.alternations == 0


def test_a_modality_that_pauses_alone_and_steps_without_one_of_the_losses() -> None:
    rows = taking_turns(turns=1, rows=400)
    for row in rows[::3]:
        row["loss/modality/image"] = None
    found = dynamics(rows, pair=PAIR, settings=Settings(window_rows=50))
    assert found.windows == 5  # 266 rows have both
    assert found.paused_fraction == (0.0, 1.0)
    with pytest.raises(UserError, match="266 rows with a loss of text and of image"):
        dynamics(rows, pair=PAIR, settings=Settings(window_rows=200))


def test_drops_are_those_of_straight_lines() -> None:
    steps = np.arange(0, 400, 4, dtype=float)
    line = 3 - 0.001 * steps + np.tile([0.2, -0.2, -0.2, 0.2], 25)  # noise that a line ignores
    assert drops(line, steps=steps, window_rows=20) == pytest.approx([0.076] * 5, rel=1e-9)
    assert alternations(np.array([1, 0, 1, -1, 0, 0, -1, 1, 0])) == 2


def test_spikes_are_found_where_they_were_planted() -> None:
    rng = np.random.default_rng(0)
    norms = 1 + 0.1 * rng.normal(size=10_000)
    planted = np.array([150, 151, 4200, 9999])
    norms[planted] = 5
    assert spikes(norms, rows=100, spread=10).tolist() == planted.tolist()
    norms[50] = 5  # nothing is known before the first window
    assert spikes(norms, rows=100, spread=10).tolist() == planted.tolist()
    assert spikes(norms[:100], rows=100, spread=10).tolist() == []
    trend = np.geomspace(5, 0.5, 2000)
    assert spikes(trend, rows=100, spread=10).tolist() == []


def test_rank_correlation() -> None:
    assert ranks(np.array([3.0, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    sizes = np.arange(8.0)
    falling = correlation(sizes, np.exp(-sizes))
    assert falling is not None
    assert falling.rho == pytest.approx(-1)
    assert falling.p == pytest.approx(2 / 40_320, abs=5e-4)
    shuffled = correlation(sizes, np.array([2.0, 7, 1, 8, 0, 6, 3, 5]))
    assert shuffled is not None
    assert shuffled.rho == pytest.approx(1 - 6 * 80 / (8 * 63))
    assert shuffled.p > 0.5
    assert correlation(sizes[:2], sizes[:2]) is None
    assert correlation(sizes, np.ones(8)) is None


def test_the_best_batch_is_the_lowest_point_of_its_parabola(tmp_path: Path) -> None:
    for place, batch in enumerate(np.geomspace(1e5, 1.6e6, 5)):
        loss = 3 + 0.02 * np.log(batch / 4e5) ** 2
        directory = write_run(tmp_path / str(place), tokens=1e10, losses={"loss": loss})
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["total_steps"] = int(1e10 / batch)
        (directory / "manifest.json").write_text(json.dumps(manifest))
        for name in ("losses", "evals"):
            log = JsonLog(directory / f"{name}.jsonl", keep_until_step=10**9)
            end = {"tokens": 10**10, "flops": 6e19, "loss": loss, "seconds": 1.0}
            log.write({"step": manifest["total_steps"], **end})
            log.close()
    write_run(tmp_path / "other", size=2e9)  # one batch only
    (best,) = best_batches(read_runs(tmp_path).finished, loss="loss")
    assert best.best_tokens == pytest.approx(4e5, rel=1e-3)
    assert best.size == 10**9


def test_the_command_compares_runs_and_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Larger models pause less here, and the pair with the larger alpha has fewer pauses."""
    for pair in range(3):
        for place, size in enumerate((1e8, 1e9, 1e10)):
            directory = write_run(tmp_path / f"runs{pair}" / str(place), size=size)
            (directory / "losses.jsonl").unlink()
            log = JsonLog(directory / "losses.jsonl", keep_until_step=0)
            rows = taking_turns(turns=2, rows=100 - 25 * place - 5 * pair)
            rows += [
                {**rows[-1], "loss/modality/text": 4 - i / 100, "loss/modality/image": 4 - i / 100}
                for i in range(400)
            ]
            for number, row in enumerate(rows, start=1):
                log.write({**row, "step": number})
            log.write({**rows[-1], "step": 10**6, "tokens": 10**10, "flops": 6e19})
            log.close()
        (tmp_path / f"fit{pair}").mkdir()
        numbers = {"C": 0.1, "A": 1, "alpha": 0.1 + 0.1 * pair, "B": 1, "beta": 0.3}
        (tmp_path / f"fit{pair}" / "fit_mixed.json").write_text(json.dumps({"parameters": numbers}))
    runs, fits = (
        [str(tmp_path / f"{kind}{pair}") for pair in range(3)] for kind in ("runs", "fit")
    )
    flags = ["--pair", *["text,image"] * 3, "--window", "25", "--out", str(tmp_path)]
    main(["phenomena", "--runs", *runs, "--fits", *fits, *flags])
    found = json.loads((tmp_path / "phenomena.json").read_text())
    assert found["settings"]["window_rows"] == 25
    assert [one["with_N"]["paused"]["rho"] for one in found["pairs"]] == pytest.approx([-1] * 3)
    assert found["over_pairs"]["paused_with_alpha"]["rho"] == pytest.approx(-1)
    assert found["over_pairs"]["batch_with_beta"] is None
    assert "paused with N: rho -1.00" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give as many of each"):
        main(["phenomena", "--runs", *runs, "--pair", "text,image", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="name two modalities"):
        main(["phenomena", "--runs", runs[0], "--pair", "text", "--out", str(tmp_path)])
