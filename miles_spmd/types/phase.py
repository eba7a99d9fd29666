"""The phases of a run: commands, heartbeats, deadlines and errors name them."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What a worker is doing."""

    START = "start"
    ROLLOUT = "rollout"
    LOG_PROBS = "log_probs"
    TRAIN = "train"
    REFIT = "refit"
    CHECKPOINT = "checkpoint"
    IDLE = "idle"
    STOP = "stop"
