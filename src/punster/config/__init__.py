"""One dataclass per verb: the single source of command-line flags, YAML keys, documentation, and what a run saves."""

from punster.config.pipeline import EvaluateConfig, PipelineConfig
from punster.config.shared import CONFIG_VERSION, TrainConfig, check_version, field_names, opt, require
from punster.config.train import (
    DistillConfig,
    DpoConfig,
    DpoLoss,
    GrpoConfig,
    KlPenalty,
    PolicyConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
    Variant,
)

__all__ = [
    "CONFIG_VERSION",
    "DistillConfig",
    "DpoConfig",
    "DpoLoss",
    "EvaluateConfig",
    "GrpoConfig",
    "KlPenalty",
    "PipelineConfig",
    "PolicyConfig",
    "PpoConfig",
    "RewardConfig",
    "SftConfig",
    "TrainConfig",
    "Variant",
    "check_version",
    "field_names",
    "opt",
    "require",
]
