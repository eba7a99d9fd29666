"""The phases of a run, by which commands, heartbeats, deadlines and errors name what a rank is doing."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What a worker is doing; carried by commands, beats and errors."""

    START = "start"
    ROLLOUT = "rollout"
    LOG_PROBS = "log_probs"
    TRAIN = "train"
    REFIT = "refit"
    CHECKPOINT = "checkpoint"
    IDLE = "idle"
    STOP = "stop"
