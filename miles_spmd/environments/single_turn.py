"""One response to a prompt: the smallest environment."""

from miles_spmd.plugins.environment import Context
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import Trajectory


async def single_turn(context: Context, prompt: Prompt) -> Trajectory:
    trajectory = context.begin(prompt.tokens)
    await context.complete(trajectory)
    return trajectory
