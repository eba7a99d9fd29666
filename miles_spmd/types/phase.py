"""The phases of a run: commands, heartbeats, deadlines and errors name them."""

from enum import StrEnum
from typing import Self


class Phase(StrEnum):
    """What a rank is doing, and the setting of ``[deadlines]`` that limits how long that may take ("": none does)."""

    deadline: str

    def __new__(cls, name: str, deadline: str = "") -> Self:
        phase = str.__new__(cls, name)
        phase._value_, phase.deadline = name, deadline
        return phase

    START = "start", "start_timeout"
    ROLLOUT = "rollout", "rollout_timeout"
    LOG_PROBS = "log_probs", "train_timeout"
    TRAIN = "train", "train_timeout"
    REFIT = "refit", "refit_timeout"
    CHECKPOINT = "checkpoint", "checkpoint_timeout"
    IDLE = "idle"
    STOP = "stop", "heartbeat_timeout"
