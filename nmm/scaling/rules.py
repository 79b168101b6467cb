"""What the papers do at a given size: the model, its learning rate, its steps, its stage.

arXiv 2504.07951, table 6 and appendix A: learning rates by size, about 2 million tokens a step,
depth 24 with the width free. The warmup by the number of steps is in nmm/schedule.py.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmm.config import DataConfig, ModelConfig, compose, load
from nmm.flops import memory_bytes, num_parameters

# N and learning rate of the dense early-fusion models, table 6; the last of the sister paper.
PUBLISHED_RATES = (
    (274.8e6, 1.5e-3),
    (464.0e6, 1.5e-3),
    (931.7e6, 5e-4),
    (1626.8e6, 4.2e-4),
    (2279.9e6, 4e-4),
    (3354.3e6, 3.5e-4),
    (8129.1e6, 2.4e-4),
)
BEYOND = -0.335  # exponent of N that the rates from 932M on follow
DEPTH = 24
WIDTH_STEP = 32  # 16 heads of an even number of channels
STEP_TOKENS = 2**21
ROW_TOKENS = DataConfig().row_tokens
FEWEST_STEPS = 1000  # the paper's shortest runs; smaller budgets take smaller steps
NEAR_PRESET = 0.12  # relative distance in N up to which a preset is taken
FILLED_MEMORY = 0.6  # of a GPU that weights and optimizer may take; the rest is activations
GPU_BYTES = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9, "GB200": 186e9}


@dataclass(frozen=True)
class Model:
    """A preset of conf/model, or one with another width; `overrides` are for train.py."""

    overrides: tuple[str, ...]
    config: ModelConfig

    @property
    def size(self) -> int:
        return num_parameters(self.config).N


def choose_model(size: float, *, family: str) -> Model:
    """The preset of that family with the nearest N; if that is far, a new width at DEPTH.

    Of models with an encoder it is the nearest preset always: they have two widths.
    """
    presets = {name: _preset(name) for name in _preset_names(family)}
    if presets:
        near = min(presets.items(), key=lambda item: _distance(item[1], size))
        near_enough = _distance(near[1], size) <= np.log1p(NEAR_PRESET)
        if near_enough or near[1].encoder is not None:
            return Model((f"model={near[0]}",), near[1])
    base = "early_275m"  # whose other fields all sizes of the paper share
    fields = vars(_preset(base))
    widths = [
        ModelConfig(**{**fields, "width": width, "depth": DEPTH})
        for width in range(2 * WIDTH_STEP, 32_768, WIDTH_STEP)
    ]
    best = min(widths, key=lambda config: _distance(config, size))
    return Model((f"model={base}", f"model.width={best.width}"), best)


def _preset_names(family: str) -> list[str]:
    folder = Path(__file__).parents[2] / "conf" / "model"
    return sorted(path.stem for path in folder.glob(f"{family}_*.yaml"))


def _preset(name: str) -> ModelConfig:
    return load(compose([f"model={name}", "schedule.total_steps=1"])).model


def _distance(config: ModelConfig, size: float) -> float:
    return float(abs(np.log(num_parameters(config).N / size)))


def learning_rate(size: float) -> float:
    """Of table 6, on straight lines between its sizes in the logarithms, and by BEYOND above them.

    Below the smallest size its rate stays, which nobody has published.
    """
    sizes, rates = np.log(np.array(PUBLISHED_RATES)).T
    beyond = BEYOND * max(0.0, np.log(size) - sizes[-1])
    return float(np.exp(np.interp(np.log(size), sizes, rates) + beyond))


def step_rows(tokens: float, *, gpus: int) -> int:
    """Rows of a step: STEP_TOKENS, halved until there are FEWEST_STEPS; a multiple of the GPUs."""
    rows = STEP_TOKENS // ROW_TOKENS
    while rows > 1 and tokens / (rows * ROW_TOKENS) < FEWEST_STEPS:
        rows //= 2
    return -(-rows // gpus) * gpus


def zero_stage(config: ModelConfig, *, gpus: int, gpu: str) -> int:
    """The lowest stage from 1 on whose states leave room for activations; else 3."""
    total = num_parameters(config).total
    for stage in (1, 2):
        taken = memory_bytes(total, zero_stage=stage, gpus=gpus)
        if taken <= FILLED_MEMORY * GPU_BYTES[gpu]:
            return stage
    return 3


def checkpoint_steps(steps: int, *, days: float) -> int:
    """About one an hour, in round numbers, at least ten in a run."""
    hourly = steps / max(days * 24, 10)
    magnitude = 10 ** np.floor(np.log10(max(hourly, 1)))
    return int(max(1, np.floor(hourly / magnitude) * magnitude))
