"""The models of a run, by the role that each plays in the algorithm."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Which of the models on a rank."""

    ACTOR = "actor"  # the model that is trained; in mode `rm` the reward model
    REF = "ref"  # the reference policy
    OLD_ACTOR = "old_actor"  # the policy that generated, where it is not the newest
    CRITIC = "critic"
    TEACHER = "teacher"
