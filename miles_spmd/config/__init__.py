"""Settings: what they are (one file per table), how they are read, overridden, checked, written and listed."""

from miles_spmd.config.algorithm import AlgorithmConfig
from miles_spmd.config.checkpoint import CheckpointConfig
from miles_spmd.config.config import Config
from miles_spmd.config.data import DataConfig
from miles_spmd.config.deadlines import DeadlinesConfig
from miles_spmd.config.determinism import DeterminismConfig
from miles_spmd.config.eval import EvalConfig
from miles_spmd.config.model import ModelConfig
from miles_spmd.config.refit import RefitConfig
from miles_spmd.config.reward import RewardConfig
from miles_spmd.config.rollout import RolloutConfig
from miles_spmd.config.run import RunConfig
from miles_spmd.config.telemetry import TelemetryConfig
from miles_spmd.config.train import TrainConfig

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeadlinesConfig",
    "DeterminismConfig",
    "EvalConfig",
    "ModelConfig",
    "RefitConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TelemetryConfig",
    "TrainConfig",
]
