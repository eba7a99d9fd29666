"""How a call of a reward function failed, in the process that made the call."""

from __future__ import annotations


class BadReward(Exception):
    """A reward function that raised, or returned no reward. ``index`` is that of the sample, where one is known.

    All arguments reach ``Exception``, so that it survives the way from a process of the pool to the controller.
    """

    def __init__(self, problem: str, index: int | None = None, trace: str = "") -> None:
        super().__init__(problem, index, trace)
        self.problem = problem
        self.index = index
        self.trace = trace
