"""The files of conf/: at most 30 lines each, and only what differs from the dataclasses."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nmm.config import Config, Kind, StudyCommand, compose, load
from nmm.config.root import CONF

GROUPS = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name != "hydra")
RATE_IS_THE_DEFAULT = ("early_275m", "early_464m", "late_289m", "late_494m")
# A file that is named for a value says it, whatever the default is.
NAMED_FOR = {
    "engine/zero1.yaml": {"zero_stage"},
    "model/metaseq_8m.yaml": {"model.width", "model.depth"},
    **{f"model/{name}.yaml": {"optim.learning_rate"} for name in RATE_IS_THE_DEFAULT},
}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} becomes {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        leaves |= inner
    return leaves


def repeated(path: Path) -> set[str]:
    """The keys of a group file that repeat a default.

    A file that begins with `# @package _global_` holds several groups.
    """
    is_study = path.parent.name == "study"
    everything = OmegaConf.structured(StudyCommand if is_study else Config)
    is_global = path.read_text().startswith("# @package _global_")
    default = everything if is_global else everything[path.parent.name]
    given = OmegaConf.masked_copy(read(path), [k for k in read(path) if k != "defaults"])
    merged = flat(OmegaConf.to_container(OmegaConf.merge(default, given), enum_to_str=True))
    defaults = flat(OmegaConf.to_container(default, enum_to_str=True))
    keys = flat(OmegaConf.to_container(given))
    return {key for key in keys if key in defaults and merged[key] == defaults[key]}


def read(path: Path) -> DictConfig:
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return loaded


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_holds_only_differences(path: Path) -> None:
    assert repeated(path) == NAMED_FOR.get(f"{path.parent.name}/{path.name}", set())


def test_a_repeated_default_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model" / "wide.yaml"
    path.parent.mkdir()
    path.write_text("width: 256\ndepth: 4\nattention: auto\nimage: {side_pixels: 64}\n")
    assert repeated(path) == {"depth", "attention", "image.side_pixels"}
    path.write_text("# @package _global_\nmodel: {width: 256, depth: 4}\noptim: {beta1: 0.9}\n")
    assert repeated(path) == {"model.depth", "optim.beta1"}


@pytest.mark.parametrize("percent", [(45, 45, 10), (40, 20, 40), (30, 30, 40), (20, 40, 40)])
def test_mixtures_have_the_shares_of_their_names(
    percent: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions are split 60-25-15; one corpus of each kind is held out ("Scaling Laws for NMM")."""
    monkeypatch.setenv("NMM_CORPORA", "/lake")
    name = "_".join(map(str, percent))
    sources = load(compose([f"data=mix_{name}", "schedule.total_steps=1"])).data.sources
    caption, interleaved, text = (share / 100 for share in percent)
    shares = [0.60 * caption, 0.25 * caption, 0.15 * caption, interleaved, text]
    assert [source.weight for source in sources.values()] == pytest.approx(shares, abs=1e-12)
    tested_on = {source.kind: source.held_out for source in sources.values() if source.held_out}
    assert tested_on == {
        Kind.caption: "/lake/hqitp/held_out-*.tar",
        Kind.interleaved: "/lake/obelics/held_out-*.tar",
        Kind.text: "/lake/dclm/held_out-*.tar",
    }


def test_no_file_is_longer_than_30_lines() -> None:
    lines = {str(path): len(path.read_text().splitlines()) for path in CONF.rglob("*.yaml")}
    assert len(lines) > len(GROUPS) > 10
    assert {path: count for path, count in lines.items() if count > 30} == {}
