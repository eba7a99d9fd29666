"""`[reward]`: which function scores responses, and the limits of the processes that it runs in."""

from __future__ import annotations

from typing import Annotated

from miles_spmd.config.table import PositiveFloat, PositiveInt, Table, plug_point


class RewardConfig(Table):
    rm_type: Annotated[str, plug_point("math", "exact")] = "math"
    """Plug point: the reward function, `math` (math-verify), `exact` (equal to the label) or `module:function`."""
    reward_timeout: PositiveFloat = 30.0
    """Seconds that one call may take; a slower one is killed and is an error."""
    reward_memory_gib: PositiveFloat = 4.0
    """GiB by which the address space of a reward process may grow."""
    reward_workers: PositiveInt = 2
    """Number of reward processes."""
    reward_batched: bool = False
    """Call a custom function once per group of responses to a prompt instead of once per response."""
