"""Rows and their scores: `[data]` to train on, `[reward]` that scores responses, `[eval]`."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from miles_spmd.config.checks import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Table, plug_point


class DataConfig(Table):
    prompt_data: str
    """JSONL or parquet file to train on; `path@[0:1000]` takes a slice of its rows."""
    input_key: str = "prompt"
    """Column of the prompt: a string or a list of chat messages."""
    label_key: str | None = "label"
    """Column of what a reward function compares a response with, and of the response in `sft`; `none`: no column."""
    chosen_key: str = "chosen"
    """Column of the preferred response (`dpo`, `rm`): a string, or the messages that continue the input's."""
    rejected_key: str = "rejected"
    """Column of the rejected response (`dpo`, `rm`), in the form of the preferred one."""
    metadata_key: str | None = "metadata"
    """Column of a mapping that is handed to custom reward functions; rows may leave it out, `none`: no column."""
    apply_chat_template: bool = False
    """Wrap a plain string as one user message. Message lists always go through the template."""
    rollout_shuffle: bool = True
    """Shuffle the rows anew in every epoch, as a function of `run.seed`; else they come in the file's order."""
    rollout_max_prompt_len: PositiveInt | None = None
    """Longest prompt in tokens. A longer one is an error naming its line, unless `drop_long_prompts`; `none`: any."""
    drop_long_prompts: bool = False
    """Leave out the rows whose prompt is longer than `rollout_max_prompt_len`."""


@rule(FILES)
def _data_files(s: Settings) -> Messages:
    evaluation = {f"eval.eval_prompt_data.{name}": path for name, path in s.eval_prompt_data.items()}
    for name, path in ({"data.prompt_data": s.prompt_data} | evaluation).items():
        file = re.sub(r"@\[[^\]]*\]$", "", path)
        if not Path(file).is_file():
            yield f"{name}: no file {file}"


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
