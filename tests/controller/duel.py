"""A game of two players that is over in four tokens, and the settings of runs that play it."""

from __future__ import annotations

import numpy as np

from miles_spmd.plugins.environment import Context
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import Segment, Trajectory

ROLES = ("first", "second")
SELF_PLAY = [
    "environment.environment=tests.controller.duel:duel",
    "environment.environment_workers=1",
    "algorithm.advantage_estimator=rae",
    "algorithm.dynamic_sampling_filter=none",
]
TWO = [*SELF_PLAY, "second_policy.second_num_gpus=1"]


async def duel(context: Context, prompt: Prompt) -> list[Trajectory]:
    """Two players of one token each in turn; the higher sum wins."""
    players = [context.begin([*prompt.tokens, place], role=role) for place, role in enumerate(ROLES)]
    sums = [0, 0]
    for turn in range(4):
        own, other = players[turn % 2], players[1 - turn % 2]
        completion = await context.complete(own, max_new_tokens=1)
        other.append(Segment([*completion.tokens], sampled=False))
        sums[turn % 2] += sum(completion.tokens)
    players[0].reward, players[1].reward = (float(np.sign(sums[0] - sums[1])) * sign for sign in (1, -1))
    return players
