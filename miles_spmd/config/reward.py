"""`[reward]`: which functions score responses, and the limits of the processes that they run in."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from miles_spmd.config.rules import ERRORS, Messages, Settings, rule
from miles_spmd.config.table import PositiveFloat, PositiveInt, Table, plug_point

RewardName = Annotated[str, plug_point("math", "exact")]


class RewardTerm(Table):
    """One of the functions whose weighted sum is a sample's reward."""

    rm_type: RewardName
    """Plug point: a reward function, as `reward.rm_type`."""
    reward_weight: float = 1.0
    """Factor of this function in the sum."""
    reward_batched: bool = False
    """Call a custom function once per group of responses to a prompt instead of once per response."""

    @property
    def name(self) -> str:
        """The name in metrics and details."""
        return self.rm_type.rpartition(":")[2]


class RewardConfig(Table):
    rm_type: RewardName = "math"
    """Plug point: the reward function, `math` (math-verify), `exact` (equal to the label) or `module:function`."""
    reward_weight: float = 1.0
    """Factor of this function where there are further ones."""
    reward_batched: bool = False
    """Call a custom function once per group of responses to a prompt instead of once per response."""
    further: list[RewardTerm] = []
    """Further reward functions: a sample's reward is the weighted sum of all. Each has metrics of its own."""
    reward_timeout: PositiveFloat = 30.0
    """Seconds that one call may take; a slower one is killed and is an error."""
    reward_memory_gib: PositiveFloat = 4.0
    """GiB by which the address space of a reward process may grow."""
    reward_workers: PositiveInt = 2
    """Number of reward processes."""
    reward_environment: list[str] = []
    """Environment variables with secrets that reward functions may see, such as the key of a judge's API; others whose
    names contain TOKEN, KEY, SECRET, PASSWORD or the like are withheld from them."""

    @property
    def terms(self) -> list[RewardTerm]:
        """All reward functions of training."""
        first = RewardTerm(rm_type=self.rm_type, reward_weight=self.reward_weight, reward_batched=self.reward_batched)
        return [first, *self.further]


@rule(ERRORS)
def _rewards_have_names(s: Settings) -> Messages:
    names = Counter(name.rpartition(":")[2] for name in (s.rm_type, *(term.rm_type for term in s.further)))
    for name, count in names.items():
        if count > 1:
            yield f"reward.further: {count} reward functions are called {name}; rename one, or add their weights"
