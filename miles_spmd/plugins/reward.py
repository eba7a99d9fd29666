"""The plug point of ``[reward]``: the signatures that a reward function may have, and what becomes of its results.

``reward.rm_type = "module:function"`` names a function with any of these signatures; ``rewards/adapters.py`` tells them
apart by the names of their parameters. All may be ``async def``. A function runs in a process of its own, with a time
limit and a memory limit; it is the user's code with the user's rights, and its process is not a sandbox
(docs/rewards.md).
"""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from miles_spmd.types.sample import Sample

RewardValue = float | Mapping[str, Any] | None
"""A finite number, or a mapping with one under ``"score"``, whose other numbers are kept as the sample's detail and
become metrics. Under ``"turn_rewards"`` it may have a list with a finite number for each turn, whose sum is the score
unless ``"score"`` is given, too. None leaves the sample to the other functions of ``[reward]``, of which one has to
score it."""


class SampleReward(Protocol):
    """Scores one sample: ``sample.text`` is the response, ``sample.prompt.label`` the label."""

    def __call__(self, sample: Sample) -> RewardValue | Awaitable[RewardValue]: ...


class GroupReward(Protocol):
    """Scores all samples of one prompt at once, in order; selected by ``reward.reward_batched``."""

    def __call__(self, samples: list[Sample]) -> Sequence[RewardValue] | Awaitable[Sequence[RewardValue]]: ...


class TrlReward(Protocol):
    """The signature of TRL's GRPOTrainer, recognised by a parameter ``prompts``, ``completions`` or ``completion_ids``.

    It is called with the samples of one prompt. Prompts and completions are strings, or lists of messages where the
    prompt is a conversation; the columns are ``label``, ``completion_ids`` and the rows' metadata, one list entry per
    sample. ``trainer_state`` is a :class:`TrainerState`. What it gives ``log_metric`` becomes its detail; what it gives
    ``log_extra`` is left out.
    """

    def __call__(
        self, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> Sequence[float | None] | Awaitable[Sequence[float | None]]: ...


class TrainerState(msgspec.Struct, frozen=True):
    """Where the run is when a reward function is called: what TRL's functions read of transformers' state."""

    global_step: int = 0
    """Number of steps of the run that were complete when the responses were generated."""
    max_steps: int = 0
    """``run.num_rollout``."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has no {name!r} here; it has {', '.join(self.__struct_fields__)}")


START = TrainerState()


class VerlReward(Protocol):
    """The signature of veRL's ``compute_score``, recognised by its parameters ``solution_str`` and ``ground_truth``; or
    in the plural, with a list of each for the samples of one prompt.

    ``data_source`` and ``extra_info`` come from the row's metadata, by default the dataset's name and all metadata;
    ``extra_info["num_turns"]`` is the number of turns of the policy and of others.
    """

    def __call__(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> RewardValue | Awaitable[RewardValue]: ...


class JudgeReader(Protocol):
    """``reward.judge_reader``: reads the score in a reply of the judge."""

    def __call__(self, reply: str) -> RewardValue:
        """Return a number, or a mapping with one under ``"score"``; None where the reply has no score, which is then
        asked for once more. ``reply`` is the whole text, with the judge's reasoning if it has any."""
        ...


class Score(msgspec.Struct, frozen=True):
    """A sample's reward, always finite, and the other numbers that the function returned."""

    value: float
    detail: dict[str, float] = {}
    turn_rewards: list[float] = []  # of all turns; empty: the function gave them none


class RewardError(RuntimeError):
    """A reward that could not be computed. The message gives function, prompt, sample, cause and remedy."""
