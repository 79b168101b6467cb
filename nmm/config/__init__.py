"""The configuration as typed dataclasses: one small module per group, no torch."""

from nmm.config.data import (
    AugmentConfig,
    DataConfig,
    Kind,
    Layout,
    SourceConfig,
    UnitModality,
    WeightChange,
)
from nmm.config.engine import EngineConfig, Precision
from nmm.config.log import CheckpointConfig, EvaluationConfig, LogConfig, WandbMode
from nmm.config.model import AttentionBackend, ImageAttention, ImageConfig, LossBackend, ModelConfig
from nmm.config.optim import OptimConfig, OptimName
from nmm.config.root import (
    Config,
    Resume,
    RunConfig,
    compose,
    load,
    read_yaml,
    register,
    run_directory,
    sentence,
    to_dict,
    to_yaml,
    with_absolute_paths,
)
from nmm.config.schedule import Cooldown, ScheduleConfig

__all__ = [
    "AttentionBackend",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "Cooldown",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ImageAttention",
    "ImageConfig",
    "Kind",
    "Layout",
    "LogConfig",
    "LossBackend",
    "ModelConfig",
    "OptimConfig",
    "OptimName",
    "Precision",
    "Resume",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "UnitModality",
    "WandbMode",
    "WeightChange",
    "compose",
    "load",
    "read_yaml",
    "register",
    "run_directory",
    "sentence",
    "to_dict",
    "to_yaml",
    "with_absolute_paths",
]
