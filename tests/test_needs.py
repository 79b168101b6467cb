"""What the machine lacks is said before any work, with key, value and remedy."""

from pathlib import Path

import pytest
import torch

from nmm.config import AttentionBackend, EngineConfig, LossBackend, ModelConfig
from nmm.errors import UserError
from nmm.needs import missing_for_compiling, refuse_missing

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EAGER, COMPILED = EngineConfig(), EngineConfig(compile=True)
FLEX = ModelConfig(attention=AttentionBackend.flex)


@pytest.mark.parametrize(
    ("model", "device", "sentence"),
    [
        (FLEX, CPU, r"model.attention is flex and .* no gradients on CPUs: .*attention=auto"),
        (ModelConfig(loss=LossBackend.liger), CPU, r"model.loss is liger and .* model.loss=auto"),
    ],
)
def test_what_runs_on_gpus_only_is_refused(
    model: ModelConfig, device: torch.device, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        refuse_missing(model, EAGER, device=device)
    refuse_missing(ModelConfig(), EAGER, device=device)


@pytest.mark.parametrize(
    ("model", "engine", "device", "sentence"),
    [
        (ModelConfig(), COMPILED, CPU, r"engine.compile is true.*\(g\+\+\).*engine.compile=false"),
        (ModelConfig(), EAGER, GPU, r"model.attention is auto.*\(g\+\+\).*model.attention=mask"),
        (FLEX, EAGER, GPU, r"model.attention is flex.*\(g\+\+\).*model.attention=mask"),
    ],
)
def test_without_a_compiler_nothing_is_compiled(
    model: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert missing_for_compiling() == "a C++ compiler (g++)"
    with pytest.raises(UserError, match=sentence):
        refuse_missing(model, engine, device=device)
    refuse_missing(ModelConfig(attention=AttentionBackend.mask), EAGER, device=device)
