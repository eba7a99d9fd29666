"""The unit of work: one prompt's sample, from request to trained tokens."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class FinishReason(StrEnum):
    """Why the engine stopped generating a sample."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_new_tokens or the context was reached
    ABORT = "abort"  # stopped from outside; the tokens so far are kept


class Prompt(msgspec.Struct, frozen=True):
    """One row of a dataset, ready to be asked."""

    uid: str  # stable identity "name:row", the same in every epoch and on every machine
    text: str  # what the model sees, chat template applied
    tokens: list[int]
    label: Any = None
    metadata: dict[str, Any] = {}


class Sample(msgspec.Struct):
    """One answer to one prompt.

    ``response`` and its aligned lists have the same length R; ``loss_mask`` is 1 where the policy chose the token.
    """

    prompt: Prompt
    index: int  # 0 .. n_samples_per_prompt - 1 within the group; siblings, parts of one rollout, share it
    response: list[int] = []
    rollout_log_probs: list[float] = []  # engine's log-prob of each response token, natural log
    loss_mask: list[int] = []
    text: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    weight_versions: list[tuple[int, int]] = []  # (version, number of tokens), in order
    reward: float | None = None
    reward_detail: dict[str, float] = {}
    top1_ids: list[int] | None = (
        None  # the engine's most likely tokens at the positions of the response, where requested
    )

    @property
    def sequence(self) -> list[int]:
        return self.prompt.tokens + self.response
