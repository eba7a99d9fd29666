"""The plug points of data: where rows come from, in which order they are used, and which groups a step trains on.

They run on the controller, and none of them may depend on anything but what it is given: a resumed or repeated run
calls them again and has to get the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from miles_spmd.types.sample import Sample


class DataSource(Protocol):
    """``data.prompt_data = "module:function"``, and so for every evaluation set: returns rows in the place of a file.

    It is called when the run starts, and before that by ``miles-spmd check``, which reads the first rows only.
    """

    def __call__(self) -> Iterable[Mapping[str, Any]]:
        """Return or yield rows with the columns that ``[data]`` names: each what an object of a JSONL file can be."""
        ...


class Curriculum(Protocol):
    """``data.curriculum``: the order in which an epoch uses the rows of the training data."""

    def __call__(self, items: Sequence[Any], epoch: int, seed: int) -> Sequence[int]:
        """Return as many indices of ``items`` as there are items; one may occur several times, and others not at all.

        ``items`` are the rows in the order of the file: a :class:`~miles_spmd.types.sample.Prompt` each in mode `rl`.
        ``epoch`` counts from 0. ``seed`` belongs to run and epoch: what is random is a function of it. Before a run
        starts, it is tried on the first rows alone."""
        ...


class Acceptor(Protocol):
    """``rollout.acceptance``: chooses the groups that a step trains on, among all that it has begun."""

    def __call__(self, groups: Sequence[Sequence[Sample]], count: int) -> Sequence[int]:
        """Return the numbers of ``count`` of the ``groups``, in the order in which they are trained on.

        ``groups`` are complete, with rewards, in the order of submission: ``over_sampling_batch_size`` of them, without
        those that ``dynamic_sampling_filter`` has dropped. It is called only where there are more than ``count``."""
        ...
