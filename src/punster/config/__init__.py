"""One dataclass per verb: the single source of command-line flags, YAML keys, documentation, and what a run saves."""

from punster.config.pipeline import EvaluateConfig, PipelineConfig
from punster.config.shared import TrainConfig
from punster.config.train import DistillConfig, DpoConfig, GrpoConfig, PolicyConfig, PpoConfig, RewardConfig, SftConfig

__all__ = [
    "DistillConfig", "DpoConfig", "EvaluateConfig", "GrpoConfig", "PipelineConfig", "PolicyConfig", "PpoConfig", "RewardConfig",
    "SftConfig", "TrainConfig",
]  # fmt: skip
