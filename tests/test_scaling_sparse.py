"""Sparse runs beside dense ones: their laws are of what a token meets, and share one axis."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nmm.config import ModelConfig, compose, load
from nmm.flops import num_parameters
from nmm.scaling.__main__ import main
from nmm.scaling.laws import CHINCHILLA
from nmm.scaling.page import comparison_section
from nmm.scaling.pieces import Figures
from nmm.scaling.report import read_study
from tests.scaling_cases import NMM
from tests.test_scaling_report import Page
from tests.test_scaling_runs import write_run

# Planted: sparse models have the lowest losses of a given active size, late ones the highest.
LAWS = {
    "early": ("tiny", NMM),
    "late": ("tiny_late", NMM | {"E": 1.98, "alpha": 0.29}),
    "sparse": ("tiny_moe", NMM | {"A": 210.0, "beta": 0.33}),
}


def widened(preset: str) -> list[ModelConfig]:
    """The preset at five widths."""
    model = load(compose([f"model={preset}", "schedule.total_steps=1"])).model
    return [replace(model, width=model.width * factor) for factor in (1, 2, 3, 4, 6)]


def family(folder: Path, *, preset: str, law: dict[str, float]) -> None:
    """Runs whose manifests have the sizes of these models."""
    for place, model in enumerate(widened(preset)):
        sizes = num_parameters(model)
        for number, tokens in enumerate(np.geomspace(2e8, 2e10, 4).round()):
            columns = {"N": np.array([sizes.N_active]), "D": np.array([tokens])}
            run = write_run(
                folder / f"{place}_{number}",
                size=sizes.N_active,
                tokens=tokens,
                losses={"loss": float(CHINCHILLA.predict(law, columns=columns)[0])},
                vision=sizes.N_vision,
            )
            manifest = json.loads((run / "manifest.json").read_text())
            (run / "manifest.json").write_text(json.dumps({**manifest, "N": sizes.N}))


def test_sparse_runs_share_the_axis_with_early_and_late(tmp_path: Path) -> None:
    fits = []
    for name, (preset, law) in LAWS.items():
        family(tmp_path / "runs" / name, preset=preset, law=law)
        out = tmp_path / name
        main(["fit", "--runs", str(tmp_path / "runs" / name), "--out", str(out)])
        found = json.loads((out / "fit.json").read_text())
        assert found["parameters"] == pytest.approx(law, rel=1e-4)
        assert ("S" in found["ranges"]) == (name == "sparse")
        fits.append((name, out))
    study = read_study(fits)
    assert [one.name for one in study.chapters] == [f"{name}: loss" for name in LAWS]
    section = comparison_section(study.chapters, figures=Figures(tmp_path / "figures"))
    page = Page(section.html)
    assert len(page.pictures) == 1
    beside = page.words.partition("Losses at the best split, lowest first:")[2]
    for at_these_flops in beside.split("at ")[1:]:
        places = [at_these_flops.index(f"{name}:") for name in ("sparse", "early", "late")]
        assert places == sorted(places)
    for one, (_, law) in zip(study.chapters, LAWS.values(), strict=True):
        size, tokens = (np.array([value]) for value in (1e7, 1e10))
        drawn = one.picture.predict(size, tokens)
        assert drawn == pytest.approx(CHINCHILLA.predict(law, columns={"N": size, "D": tokens}))
