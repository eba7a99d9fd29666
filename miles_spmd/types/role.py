"""The models of a run, named by their role in the algorithm."""

from enum import StrEnum


class Role(StrEnum):
    """Identifies one of the models on a rank."""

    ACTOR = "actor"  # the model that is trained; in mode `rm` the reward model
    REF = "ref"  # the reference policy
    OLD_ACTOR = "old_actor"  # the policy that generated, where it lags behind the actor
    CRITIC = "critic"
    TEACHER = "teacher"
