"""One dataclass per verb: the single source of command-line flags, YAML keys, documentation, and what a run saves."""

from punster.config.pipeline import EvaluateConfig, PipelineConfig
from punster.config.shared import CONFIG_VERSION, TrainConfig, check_version
from punster.config.train import DistillConfig, DpoConfig, GrpoConfig, PolicyConfig, PpoConfig, RewardConfig, SftConfig

__all__ = [
    "CONFIG_VERSION", "DistillConfig", "DpoConfig", "EvaluateConfig", "GrpoConfig", "PipelineConfig", "PolicyConfig", "PpoConfig",
    "RewardConfig", "SftConfig", "TrainConfig", "check_version",
]  # fmt: skip
