"""What a reward function may look like, and what comes of it.

``reward.rm_type = "module:function"`` names any of these; the name of its parameters tells which one it is
(``functions.bind``). All may be ``async def``. A function runs in its own process with a time and memory limit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from miles_spmd.types.sample import Sample

RewardValue = float | Mapping[str, Any]
"""A finite number, or an object with one under ``"score"``, whose other numbers are kept as the sample's detail."""


class SampleReward(Protocol):
    """Scores one sample: ``sample.text`` is the answer, ``sample.prompt.label`` the label."""

    def __call__(self, sample: Sample) -> RewardValue | Awaitable[RewardValue]: ...


class GroupReward(Protocol):
    """Scores all samples of one prompt at once, in order; chosen by ``reward.reward_batched``."""

    def __call__(self, samples: list[Sample]) -> Sequence[RewardValue] | Awaitable[Sequence[RewardValue]]: ...


class TrlReward(Protocol):
    """The shape of TRL's GRPOTrainer, known by its parameter ``completions``.

    It gets the samples of one prompt. Prompts and completions are strings, or lists of messages where the prompt is a
    conversation; the columns are ``label`` and the rows' metadata, one list entry per sample.
    """

    def __call__(
        self, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> Sequence[float] | Awaitable[Sequence[float]]: ...


class VerlReward(Protocol):
    """The shape of veRL's ``compute_score``, known by its parameters ``solution_str`` and ``ground_truth``.

    ``data_source`` and ``extra_info`` come from the row's metadata, by default the dataset's name and all metadata.
    """

    def __call__(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> RewardValue | Awaitable[RewardValue]: ...


class Score(msgspec.Struct, frozen=True):
    """A sample's reward, always finite, with what else the function told about it."""

    value: float
    detail: dict[str, float] = {}


class RewardError(RuntimeError):
    """A reward that could not be computed: which function, which prompt and sample, why, and what to do."""
