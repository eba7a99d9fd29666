"""What the policy acts upon (`[environment]`)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from miles_spmd.config.checks import ERRORS, Messages, Settings, rule
from miles_spmd.config.table import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Table,
    plug_point,
)

SINGLE_TURN = "single_turn"


class EnvironmentConfig(Table):
    environment: Annotated[str, plug_point(SINGLE_TURN, "tools")] = SINGLE_TURN
    """Plug point: how a prompt becomes trajectories. `single_turn`: one response; `tools`: the model calls Python
    functions; a function of yours can do anything else (docs/environments.md)."""
    environment_kwargs: dict[str, Any] = {}
    """Further arguments of the environment, by the names of its parameters."""
    trained_leaves: Annotated[str, plug_point("all", "longest", "last")] = "all"
    """Plug point: which of the trajectories of one rollout the loss counts, where an episode has branches or
    sub-agents: all, the one with most turns, or the one whose last response was asked for last."""
    environment_workers: PositiveInt = 2
    """Number of processes in which environments run, each in an event loop; `single_turn` needs none."""
    environment_concurrency: PositiveInt = 256
    """Number of episodes that one process runs at a time; further ones wait. In an evaluation, training episodes that
    wait for the next step do not count."""
    environment_cache_share: NonNegativeFloat = 0.0
    """Episodes begin as long as those that run are expected to fill at most this share of the engine's KV cache; 0:
    whatever they fill. What it gains and costs: docs/environments.md."""
    environment_timeout: Seconds = 60.0
    """Seconds that an environment may take from one response of the policy to its next request, or its end."""
    environment_memory_gib: PositiveFloat = 4.0
    """GiB by which the address space of an environment process may grow."""
    environment_variables: list[str] = []
    """Environment variables with secrets that environments may see, such as the key of a search service; others whose
    names contain TOKEN, KEY, SECRET, PASSWORD or the like are withheld from them."""
    environment_retries: NonNegativeInt = 1
    """How often an episode is begun anew, with the same seeds, after its environment has failed."""
    on_environment_failure: Literal["replace", "mask", "stop"] = "replace"
    """What becomes of an episode that has failed for good: its group is dropped and another prompt takes its place
    (`replace`); it is left out of its group (`mask`); the run ends (`stop`). It is never trained as reward 0."""
    max_environment_failures: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of a rollout's episodes that may fail for good; more end the run with the most frequent message."""


@rule(ERRORS)
def _groups_can_be_masked(s: Settings) -> Messages:
    if s.on_environment_failure == "mask" and s.n_samples_per_prompt == 1:
        yield (
            "environment.on_environment_failure: 'mask' leaves nothing of a group of one sample; take 'replace', or "
            "raise rollout.n_samples_per_prompt"
        )
