"""What the papers do at a given size: the model, its learning rate, its steps, its stage.

arXiv 2504.07951, table 6 and appendix A: learning rates by size (those of the presets), about 2
million tokens a step, depth 24 with the width free. The warmup by the number of steps is in
nmm/schedule.py; a preset's own schedule says which.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from nmm.config import Config, DataConfig, ModelConfig, ScheduleConfig, compose, load
from nmm.errors import UserError
from nmm.flops import num_parameters, state_bytes

BEYOND = -0.335  # exponent of N that the early rates from 932M on follow
DEPTH = 24
SIZED = re.compile(r".+_\d+(p\d+)?[mb]")  # FAMILY_SIZE, like moe_8e_1p63b
ENCODER_WIDTH = 0.5  # of the decoder's: 0.5 for most of table 6, 0.48 once
WIDTH_STEP = 32  # 16 heads of an even number of channels
STEP_TOKENS = 2**21
ROW_TOKENS = DataConfig().row_tokens
FEWEST_STEPS = 1000  # the paper's shortest runs; smaller budgets take smaller steps
NEAR_PRESET = 0.12  # relative distance in N up to which a preset is taken
FILLED_MEMORY = 0.6  # of a GPU that weights and optimizer may take; the rest is activations
GPU_BYTES = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9, "GB200": 186e9}


@dataclass(frozen=True)
class Model:
    """A preset of conf/model, or one with another width; `overrides` are for train.py.

    `schedule` is the preset's own, whose total is not yet that of a plan.
    """

    overrides: tuple[str, ...]
    config: ModelConfig
    schedule: ScheduleConfig

    @property
    def size(self) -> int:
        """N of the laws: what a token passes through, with a vision encoder if there is one."""
        return num_parameters(self.config).N_active


def choose_model(size: float, *, family: str, data: str | None = None) -> Model:
    """The preset of that family with the nearest N; if that is far, its recipe at a new width.

    A new model has the paper's depth, and a vision encoder of half its width if the family has one.
    Raises UserError for a family without presets, or one that cannot read the group `data` of
    conf/data (None: that of conf/config.yaml).
    """
    presets = _presets(family, data)
    base = min(presets, key=lambda name: _distance(presets[name].model, size))
    near, schedule = presets[base].model, presets[base].schedule
    if _distance(near, size) <= np.log1p(NEAR_PRESET):
        return Model((f"model={base}",), near, schedule)
    step = math.lcm(WIDTH_STEP, 2 * near.heads)
    best = min(
        (_widened(near, width=width) for width in range(step, 32_768, step)),
        key=lambda config: _distance(config, size),
    )
    overrides = [f"model={base}", f"model.width={best.width}"]
    overrides += [f"model.depth={best.depth}"] * (best.depth != near.depth)
    if best.vision is not None and near.encoder is not None:
        overrides.append(f"model.vision.width={best.vision.width}")
    return Model(tuple(overrides), best, schedule)


def _widened(config: ModelConfig, *, width: int) -> ModelConfig:
    vision = config.vision
    if config.encoder is not None and vision is not None:
        step = math.lcm(WIDTH_STEP, 2 * vision.heads)
        vision = replace(vision, width=max(step, round(ENCODER_WIDTH * width / step) * step))
    return replace(config, width=width, depth=DEPTH, vision=vision)


@cache
def _presets(family: str, data: str | None) -> dict[str, Config]:
    """The composed presets conf/model/FAMILY_SIZE.yaml by name; raises UserError without any.

    The first part of a name is enough where one family of those that begin so has the most sizes:
    `moe` is `moe_8e`, beside which there are ablations at one size.
    """
    folder = Path(__file__).parents[2] / "conf" / "model"
    families: dict[str, list[str]] = {}
    for name in sorted(path.stem for path in folder.glob("*_*.yaml")):
        if SIZED.fullmatch(name):
            families.setdefault(name.rpartition("_")[0], []).append(name)
    names = families.get(family) or _most_sizes(
        [sizes for name, sizes in families.items() if name.startswith(f"{family}_")]
    )
    if not names:
        raise UserError(
            f"--family is {family}, of which conf/model has no preset, or several families alike; "
            f"choose of: {', '.join(families)}."
        )
    more = ["schedule.total_steps=1", *([] if data is None else [f"data={data}"])]
    return {name: load(compose([f"model={name}", *more])) for name in names}


def _most_sizes(families: Sequence[list[str]]) -> list[str]:
    """The family that has more sizes than every other; empty if there is none."""
    ranked = sorted(families, key=len, reverse=True)
    if not ranked or (len(ranked) > 1 and len(ranked[0]) == len(ranked[1])):
        return []
    return ranked[0]


def _distance(config: ModelConfig, size: float) -> float:
    return float(abs(np.log(num_parameters(config).N_active / size)))


def published_rates(family: str, *, data: str | None = None) -> list[tuple[int, float]]:
    """N and learning rate of the family's presets, which are those of their papers, by N."""
    return sorted(
        (num_parameters(settings.model).N_active, settings.optim.learning_rate)
        for settings in _presets(family, data).values()
    )


def learning_rate(size: float, *, family: str, data: str | None = None) -> float:
    """On straight lines in the logarithms between the family's sizes, and by BEYOND above them.

    Below the smallest size its rate stays, which nobody has published.
    """
    sizes, rates = np.log(np.array(published_rates(family, data=data))).T
    beyond = BEYOND * max(0.0, np.log(size) - sizes[-1])
    return float(np.exp(np.interp(np.log(size), sizes, rates) + beyond))


def step_rows(tokens: float, *, gpus: int) -> int:
    """Rows of a step: STEP_TOKENS, halved until there are FEWEST_STEPS; a multiple of the GPUs."""
    rows = STEP_TOKENS // ROW_TOKENS
    while rows > 1 and tokens / (rows * ROW_TOKENS) < FEWEST_STEPS:
        rows //= 2
    return -(-rows // gpus) * gpus


def zero_stage(config: ModelConfig, *, gpus: int, gpu: str, expert_parallel: int = 1) -> int:
    """The lowest stage from 1 on whose states leave room for activations; else 3."""
    for stage in (1, 2):
        taken = state_bytes(config, zero_stage=stage, gpus=gpus, expert_parallel=expert_parallel)
        if taken <= FILLED_MEMORY * GPU_BYTES[gpu]:
            return stage
    return 3


def checkpoint_steps(steps: int, *, days: float) -> int:
    """About one an hour, in round numbers, at least ten in a run."""
    hourly = steps / max(days * 24, 10)
    magnitude = 10 ** np.floor(np.log10(max(hourly, 1)))
    return int(max(1, np.floor(hourly / magnitude) * magnitude))
