"""The unit of work: a response to a prompt, from request to reward."""

from enum import StrEnum
from typing import Any

import msgspec


class FinishReason(StrEnum):
    """Why the engine stopped generating a sample."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_new_tokens or the context was reached
    ABORT = "abort"  # stopped from outside; the tokens so far are kept


class Prompt(msgspec.Struct, frozen=True):
    """One row of a dataset, tokenized."""

    uid: str  # "name:row", the same in every epoch and on every machine
    text: str  # the model's input, with the chat template applied
    tokens: list[int]
    label: Any = None
    metadata: dict[str, Any] = {}


class Sample(msgspec.Struct):
    """One response to one prompt.

    ``response``, ``rollout_log_probs``, ``loss_mask`` and ``top1_ids`` have the same length, that of the response.
    """

    prompt: Prompt
    index: int  # 0 .. n_samples_per_prompt - 1 within its group; siblings, the samples of one rollout, share it
    response: list[int] = []
    rollout_log_probs: list[float] = []  # the engine's log-prob of each response token, natural log
    loss_mask: list[int] = []  # 1 where the policy sampled the token
    text: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    weight_versions: list[tuple[int, int]] = []  # (version, number of tokens), in order
    reward: float | None = None
    reward_detail: dict[str, float] = {}
    top1_ids: list[int] | None = None  # the engine's top-1 token at each position, if requested

    @property
    def sequence(self) -> list[int]:
        """Token ids of prompt and response."""
        return self.prompt.tokens + self.response
