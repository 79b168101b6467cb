"""What the papers do at a given size: the model, its learning rate, its steps, its stage.

arXiv 2504.07951, table 6 and appendix A: learning rates by size (those of the presets), about 2
million tokens a step, depth 24 with the width free. The warmup of dense models by the number of
steps is in nmm/schedule.py.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from nmm.config import Config, DataConfig, ModelConfig, compose, load
from nmm.errors import UserError
from nmm.flops import memory_bytes, num_parameters

BEYOND = -0.335  # exponent of N that the early rates from 932M on follow
DEPTH = 24
ENCODER_WIDTH = 0.5  # of the decoder's: 0.5 for most of table 6, 0.48 once
SPARSE_SHORT_STEPS, SPARSE_WARMUP_STEPS = 20_000, 2500
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
        """N of the laws: what a token passes through, with a vision encoder if there is one."""
        return num_parameters(self.config).N_active

    @property
    def is_sparse(self) -> bool:
        return self.size < num_parameters(self.config).N


def choose_model(size: float, *, family: str) -> Model:
    """The preset of that family with the nearest N; if that is far, its recipe at a new width.

    A new model has the paper's depth, and a vision encoder of half its width if the family has one.
    Raises UserError for a family without presets.
    """
    presets = {name: settings.model for name, settings in _presets(family).items()}
    base, near = min(presets.items(), key=lambda item: _distance(item[1], size))
    if _distance(near, size) <= np.log1p(NEAR_PRESET):
        return Model((f"model={base}",), near)
    step = math.lcm(WIDTH_STEP, 2 * near.heads)
    best = min(
        (_widened(near, width=width) for width in range(step, 32_768, step)),
        key=lambda config: _distance(config, size),
    )
    overrides = [f"model={base}", f"model.width={best.width}"]
    overrides += [f"model.depth={best.depth}"] * (best.depth != near.depth)
    if best.vision is not None and near.encoder is not None:
        overrides.append(f"model.vision.width={best.vision.width}")
    return Model(tuple(overrides), best)


def _widened(config: ModelConfig, *, width: int) -> ModelConfig:
    vision = config.vision
    if config.encoder is not None and vision is not None:
        step = math.lcm(WIDTH_STEP, 2 * vision.heads)
        vision = replace(vision, width=max(step, round(ENCODER_WIDTH * width / step) * step))
    return replace(config, width=width, depth=DEPTH, vision=vision)


@cache
def _presets(family: str) -> dict[str, Config]:
    """The composed presets conf/model/FAMILY_*.yaml by name; raises UserError without any."""
    folder = Path(__file__).parents[2] / "conf" / "model"
    names = sorted(path.stem for path in folder.glob("*_*.yaml"))
    found = [name for name in names if name.startswith(f"{family}_")]
    if not found:
        families = dict.fromkeys(name.rpartition("_")[0] for name in names)
        raise UserError(
            f"--family is {family}, of which conf/model has no preset; choose of: "
            f"{', '.join(families)}."
        )
    return {name: load(compose([f"model={name}", "schedule.total_steps=1"])) for name in found}


def _distance(config: ModelConfig, size: float) -> float:
    return float(abs(np.log(num_parameters(config).N_active / size)))


def published_rates(family: str) -> list[tuple[int, float]]:
    """N and learning rate of the family's presets, which are those of their papers, by N."""
    return sorted(
        (num_parameters(settings.model).N_active, settings.optim.learning_rate)
        for settings in _presets(family).values()
    )


def learning_rate(size: float, *, family: str) -> float:
    """On straight lines in the logarithms between the family's sizes, and by BEYOND above them.

    Below the smallest size its rate stays, which nobody has published.
    """
    sizes, rates = np.log(np.array(published_rates(family))).T
    beyond = BEYOND * max(0.0, np.log(size) - sizes[-1])
    return float(np.exp(np.interp(np.log(size), sizes, rates) + beyond))


def sparse_warmup_steps(total_steps: int) -> int | None:
    """Sparse models warm up for longer in short runs; None: as dense ones (appendix A)."""
    if total_steps >= SPARSE_SHORT_STEPS:
        return None
    return min(SPARSE_WARMUP_STEPS, total_steps // 2)


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
