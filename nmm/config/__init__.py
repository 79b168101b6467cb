"""The configuration as typed dataclasses: one small module per group, no torch."""

from nmm.config.block import FFN, BlockConfig, Norm, NormPosition, QKNorm
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
from nmm.config.model import (
    AttentionBackend,
    GivenWeights,
    ImageAttention,
    ImageConfig,
    ImageKind,
    LossBackend,
    ModelConfig,
    Positions,
    VisionConfig,
)
from nmm.config.moe import ExpertGroups, MoEConfig, Routing
from nmm.config.optim import OptimConfig, OptimName
from nmm.config.parent import ParentConfig, ParentMode
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
    "FFN",
    "AttentionBackend",
    "AugmentConfig",
    "BlockConfig",
    "CheckpointConfig",
    "Config",
    "Cooldown",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExpertGroups",
    "GivenWeights",
    "ImageAttention",
    "ImageConfig",
    "ImageKind",
    "Kind",
    "Layout",
    "LogConfig",
    "LossBackend",
    "MoEConfig",
    "ModelConfig",
    "Norm",
    "NormPosition",
    "OptimConfig",
    "OptimName",
    "ParentConfig",
    "ParentMode",
    "Positions",
    "Precision",
    "QKNorm",
    "Resume",
    "Routing",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "UnitModality",
    "VisionConfig",
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
