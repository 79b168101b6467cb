"""Counts without building equal counts of the built module, and the published sizes."""

import json
from dataclasses import replace

import pytest
import torch

from nmm.config import ImageConfig, ModelConfig
from nmm.errors import UserError
from nmm.flops import flops_per_token, memory_bytes, num_parameters, peak_flops_per_second
from nmm.model import Model
from nmm.model.__main__ import main, model_config

EARLY = ModelConfig(
    width=800,
    depth=24,
    heads=16,
    vocab_size=50_432,
    image=ImageConfig(side_pixels=224, patch_pixels=14),
)


@pytest.mark.parametrize(
    "config", [EARLY, ModelConfig(), replace(EARLY, qk_norm=False), replace(EARLY, width=5120)]
)
def test_total_equals_the_built_module(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Model(config)
    built = {name: p.numel() for name, p in model.named_parameters()}
    parameters = num_parameters(config)
    assert parameters.total == sum(built.values())
    assert parameters.norm == sum(n for name, n in built.items() if "norm" in name)
    assert parameters.attention == sum(
        n for name, n in built.items() if name.endswith(("qkv.weight", "out.weight"))
    )
    assert parameters.ffn == sum(n for name, n in built.items() if ".ffn." in name)


@pytest.mark.parametrize(
    ("width", "millions"),
    [
        (800, 274.8),
        (1088, 464.0),
        (1632, 931.7),
        (2208, 1626.8),
        (2624, 2279.9),
        (3232, 3354.3),
        (5120, 8129.1),
    ],
)
def test_published_sizes(width: int, millions: float) -> None:
    """Table 6 of "Scaling Laws for Native Multimodal Models", with the vocabulary of GPT-NeoX."""
    parameters = num_parameters(replace(EARLY, width=width))
    assert abs(parameters.N / 1e6 - millions) < 0.06
    assert parameters.N_active == parameters.N


def test_early_275m_exactly() -> None:
    config = model_config(["model=early_275m"])
    assert config == EARLY
    assert num_parameters(config).N == 274_841_600
    assert flops_per_token(config) == 6 * 274_841_600


def test_tiny_is_the_default() -> None:
    assert model_config([]) == model_config(["model=tiny"]) == ModelConfig()


def test_memory_is_16_bytes_a_parameter_shared_by_stage() -> None:
    for stage, eight in ((0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)):
        assert memory_bytes(1000, zero_stage=stage, gpus=1) == 16_000
        assert memory_bytes(1000, zero_stage=stage, gpus=8) == 1000 * eight


def test_peaks_by_device_name() -> None:
    assert peak_flops_per_second("NVIDIA H200") == 989.4e12
    assert peak_flops_per_second("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_per_second("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops_per_second("") is None


def test_describe_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe", "model=early_275m", "--json", "model.depth=12"])
    printed = json.loads(capsys.readouterr().out)
    expected = num_parameters(replace(EARLY, depth=12))
    assert printed["N"] == printed["N_active"] == expected.N
    assert printed["N_vision"] == 0
    assert printed["parameters_total"] == sum(printed["parts"].values()) == expected.total
    assert printed["flops_per_token"] == 6 * expected.N


def test_describe_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe", "model=early_275m"])
    printed = capsys.readouterr().out
    assert "274,841,600" in printed
    assert "1,649,049,600" in printed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heads=3", "model.heads is 3"),
        ("model.dept=3", "Key 'dept'"),
        ("model=nope", "Could not find 'model/nope'"),
        ("model.width=wide", "could not be converted to Integer"),
    ],
)
def test_describe_refuses_in_one_sentence(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_config([override])
    assert "\n" not in str(caught.value)
