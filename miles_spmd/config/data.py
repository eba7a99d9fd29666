"""Rows: `[data]` to train on, `[eval]` to evaluate on."""

import os
from collections import Counter
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from miles_spmd.config.checks import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.config.reward import RewardName, RewardTerm
from miles_spmd.config.table import (
    DataFile,
    NonNegativeInt,
    PositiveInt,
    Table,
    Temperature,
    must_be,
    names_function,
    plug_point,
    without_slice,
)

# What a chat template is given by other ways than `chat_template_kwargs`.
TEMPLATE_VARIABLES = frozenset(
    {
        "messages",
        "conversations",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "return_assistant_tokens_mask",
        "strftime_now",
    }
)


TemplateArguments = Annotated[
    dict[str, Any],
    must_be(
        f"without {', '.join(sorted(TEMPLATE_VARIABLES))}", lambda given: not TEMPLATE_VARIABLES.intersection(given)
    ),
]


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


class DataConfig(Table):
    prompt_data: DataFile
    """Plug point: a JSONL, JSON or parquet file to train on, or `module:function`, which returns rows; `@[0:1000]`
    behind it takes a slice of them."""
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
    """Wrap a plain string as one user message. Message lists always go through the chat template."""
    system_prompt: str | None = None
    """System message put before every conversation that does not begin with one; `none`: no message."""
    tool_key: str | None = "tools"
    """Column of the tools that the chat template is given: a list of JSON schemas, also as JSON text; rows may leave it
    out, `none`: no column."""
    chat_template_kwargs: TemplateArguments = {}
    """Further variables of the chat template, such as `{ enable_thinking = false }`. A row's own, in a column
    `chat_template_kwargs`, come before these."""
    chat_template_date: Annotated[str, must_be("a date such as 2026-01-31", _is_date)] = "2026-01-01"
    """What a chat template reads as today, so that prompts do not depend on when a run is started or resumed."""
    rollout_shuffle: bool = True
    """Shuffle the rows anew in every epoch, as a function of `run.seed`; else they come in the file's order."""
    curriculum: Annotated[str, plug_point()] | None = None
    """Plug point: the order in which an epoch uses the rows, in the place of `rollout_shuffle`."""
    rollout_max_prompt_len: PositiveInt | None = None
    """Longest prompt in tokens. A longer one is an error naming its line, unless `drop_long_prompts`; `none`: any."""
    drop_long_prompts: bool = False
    """Leave out the rows whose prompt is longer than `rollout_max_prompt_len`."""


@rule(FILES)
def _data_files(s: Settings) -> Messages:
    evaluation = {f"eval.eval_prompt_data.{name}": path for name, path in s.eval_prompt_data.items()}
    evaluation |= {f"eval.sets.{number}.prompt_data": one.prompt_data for number, one in enumerate(s.sets)}
    for name, path in ({"data.prompt_data": s.prompt_data} | evaluation).items():
        file = without_slice(path)
        if not names_function(file) and not os.path.isfile(os.path.expanduser(file)):
            isdir = os.path.isdir(os.path.expanduser(file))
            yield f"{name}: " + (f"{file} is a folder; name the file in it" if isdir else f"no file {file}")


class EvalSet(Table):
    """A held-out set with settings of its own; what is absent is that of `[data]`, `[reward]` or `[eval]`."""

    name: str
    """The name in metrics, progress and report."""
    prompt_data: DataFile
    """JSONL or parquet file, as `data.prompt_data`."""
    eval_interval: NonNegativeInt | None = None
    """Evaluate this set every n rollouts, before the first and after the last; 0: never."""
    input_key: str | None = None
    """Column of the prompt."""
    label_key: str | None = None
    """Column of the label; an empty string: no column."""
    metadata_key: str | None = None
    """Column of a mapping for reward functions; an empty string: no column."""
    apply_chat_template: bool | None = None
    """Wrap a plain string as one user message."""
    system_prompt: str | None = None
    """System message put before every conversation that does not begin with one; an empty string: no message."""
    tool_key: str | None = None
    """Column of the tools; an empty string: no column."""
    chat_template_kwargs: TemplateArguments | None = None
    """Further variables of the chat template, in place of those of `[data]`."""
    rm_type: RewardName | None = None
    """Plug point: the only reward function of this set, instead of those of `[reward]`."""
    reward_batched: bool = False
    """Call that function once per group of responses to a prompt instead of once per response."""
    n_samples_per_eval_prompt: PositiveInt | None = None
    """Number of responses to each prompt, which is the k of pass@k."""
    eval_temperature: Temperature | None = None
    """Sampling temperature; 0 always takes the top-1 token."""
    eval_top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """`rollout_top_p` of this set."""
    eval_max_response_len: PositiveInt | None = None
    """Longest response in tokens."""

    @property
    def terms(self) -> list[RewardTerm]:
        """The reward function of this set alone; empty where it is scored by those of `[reward]`."""
        return [] if self.rm_type is None else [RewardTerm(rm_type=self.rm_type, reward_batched=self.reward_batched)]

    def columns(self, data: DataConfig) -> DataConfig:
        """Return ``data`` with the columns of this set."""
        names = DataConfig.model_fields.keys() & EvalSet.model_fields.keys() - {"prompt_data"}
        return data.model_copy(update={name: own for name in names if (own := getattr(self, name)) is not None})


class EvalConfig(Table):
    eval_interval: NonNegativeInt = 0
    """Evaluate every n rollouts, before the first and after the last; 0: never."""
    evaluator: Annotated[str, plug_point()] | None = None
    """Plug point: computes further metrics from the responses to each evaluation set."""
    eval_prompt_data: dict[str, DataFile] = {}
    """Evaluation sets: name -> file, as `prompt_data`. In `dpo` and `rm` they are pairs, and what is measured is how
    often the preferred response is the one that the model prefers."""
    sets: list[EvalSet] = []
    """Evaluation sets with settings of their own: columns, reward, sampling, interval."""
    n_samples_per_eval_prompt: PositiveInt = 1
    """Number of responses to each evaluation prompt, which is the k of pass@k."""
    eval_temperature: Temperature = 0.0
    """Sampling temperature of evaluations; 0 always takes the top-1 token."""
    eval_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`rollout_top_p` of evaluations."""
    eval_max_response_len: PositiveInt | None = None
    """Longest response of evaluations in tokens; the default is `rollout_max_response_len`."""


@rule(ERRORS)
def _evaluation_has_data(s: Settings) -> Messages:
    if s.eval_interval and not s.eval_prompt_data and not s.sets:
        yield f"eval.eval_prompt_data: is empty, but eval_interval is {s.eval_interval}"
    names = Counter([*s.eval_prompt_data, *(one.name for one in s.sets)])
    for name, count in names.items():
        if not (name and name.isprintable()):
            yield f"eval.sets: the name of an evaluation set must be printable text, got {name!r}; rename it"
        if count > 1:
            yield f"eval.sets: {count} evaluation sets are called {name!r}; rename one"


@rule(ERRORS)
def _pairs_have_no_settings_of_their_own(s: Settings) -> Messages:
    for number, one in enumerate(s.sets):
        for name in sorted(one.model_fields_set & _OF_RESPONSES if s.mode in ("dpo", "rm") else ()):
            if getattr(one, name):
                yield f"eval.sets.{number}.{name}: has no effect in mode {s.mode!r}, which compares pairs; leave it out"


_OF_RESPONSES = {
    *("label_key", "rm_type", "reward_batched", "n_samples_per_eval_prompt"),
    *("eval_temperature", "eval_top_p", "eval_max_response_len"),
}


def evaluates(s: Settings) -> bool:
    """Whether a run evaluates any set."""
    return bool(s.eval_interval) or any(one.eval_interval for one in s.sets)
