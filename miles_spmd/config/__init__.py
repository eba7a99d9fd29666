"""Settings: what they are (one file per table), how they are read, overridden, checked, written and listed."""

from miles_spmd.config.algorithm import AlgorithmConfig as AlgorithmConfig
from miles_spmd.config.checkpoint import CheckpointConfig as CheckpointConfig
from miles_spmd.config.config import Config as Config
from miles_spmd.config.data import DataConfig as DataConfig
from miles_spmd.config.deadlines import DeadlinesConfig as DeadlinesConfig
from miles_spmd.config.determinism import DeterminismConfig as DeterminismConfig
from miles_spmd.config.eval import EvalConfig as EvalConfig
from miles_spmd.config.model import ModelConfig as ModelConfig
from miles_spmd.config.refit import RefitConfig as RefitConfig
from miles_spmd.config.reward import RewardConfig as RewardConfig
from miles_spmd.config.reward import RewardTerm as RewardTerm
from miles_spmd.config.rollout import RolloutConfig as RolloutConfig
from miles_spmd.config.run import RunConfig as RunConfig
from miles_spmd.config.telemetry import TelemetryConfig as TelemetryConfig
from miles_spmd.config.train import TrainConfig as TrainConfig
