"""`[eval]`: when and on what a model is evaluated."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from miles_spmd.config.rules import ERRORS, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeFloat, NonNegativeInt, PositiveInt, Table


class EvalConfig(Table):
    eval_interval: NonNegativeInt = 0
    """Evaluate every n rollouts, before the first and after the last; 0: never."""
    eval_prompt_data: dict[str, str] = {}
    """Evaluation sets: name -> file, as `prompt_data`. In `dpo` and `rm` they are pairs, and what is measured is how
    often the preferred response is the one that the model prefers."""
    n_samples_per_eval_prompt: PositiveInt = 1
    """Number of responses to each evaluation prompt, which is the k of pass@k."""
    eval_temperature: NonNegativeFloat = 0.0
    """Sampling temperature of evaluations; 0 always takes the top-1 token."""
    eval_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`rollout_top_p` of evaluations."""
    eval_max_response_len: PositiveInt | None = None
    """Longest response of evaluations in tokens; the default is `rollout_max_response_len`."""


@rule(ERRORS)
def _evaluation_has_data(s: Settings) -> Messages:
    if s.eval_interval and not s.eval_prompt_data:
        yield f"eval.eval_prompt_data: is empty, but eval_interval is {s.eval_interval}"
