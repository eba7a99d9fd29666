"""Rows and their scores: `[data]` to train on, `[reward]` that scores responses, `[eval]`."""

import os
import re
from collections import Counter
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from miles_spmd.config.checks import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.config.table import (
    DataFile,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Table,
    Temperature,
    must_be,
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
    """JSONL, JSON or parquet file to train on; `path@[0:1000]` takes a slice of its rows."""
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
        if not os.path.isfile(os.path.expanduser(file)):
            isdir = os.path.isdir(os.path.expanduser(file))
            yield f"{name}: " + (f"{file} is a folder; name the file in it" if isdir else f"no file {file}")


RewardName = Annotated[str, plug_point("math", "exact", "f1", "gpqa", "code", "remote", "judge")]
Url = Annotated[
    str,
    must_be(
        "a URL that begins with http:// or https:// and has no password",
        re.compile(r"https?://[^/\s@]+(/\S*)?").fullmatch,
    ),
]


class RewardTerm(Table):
    """One of the functions whose weighted sum is a sample's reward."""

    rm_type: RewardName
    """Plug point: a reward function, as `reward.rm_type`."""
    reward_weight: float = 1.0
    """Factor of this function in the sum."""
    reward_batched: bool = False
    """Call a custom function once per group of responses to a prompt instead of once per response."""

    @property
    def name(self) -> str:
        """The name in metrics and details."""
        return self.rm_type.rpartition(":")[2]


class RewardConfig(Table):
    rm_type: RewardName = "math"
    """Plug point: the reward function, `math` (math-verify), `exact` (equal to the label), `f1` (of SQuAD), `gpqa` (the
    letter of a choice), `code` (passes the label's tests in the sandbox), `remote` (a service of yours), `judge` (a
    language model) or `module:function`."""
    reward_weight: float = 1.0
    """Factor of this function where there are further ones."""
    reward_batched: bool = False
    """Call a custom function once per group of responses to a prompt instead of once per response."""
    further: list[RewardTerm] = []
    """Further reward functions: a sample's reward is the weighted sum of all. Each has metrics of its own."""
    reward_timeout: Seconds = 30.0
    """Seconds that one call may take; a slower one is killed and is an error."""
    reward_memory_gib: PositiveFloat = 4.0
    """GiB by which the address space of a reward process may grow."""
    reward_workers: PositiveInt = 2
    """Number of reward processes."""
    reward_environment: list[str] = []
    """Environment variables with secrets that reward functions may see, such as the key of a judge's API; others whose
    names contain TOKEN, KEY, SECRET, PASSWORD or the like are withheld from them."""

    remote_url: Url | None = None
    """Where `remote` posts each response: an object with `prompt`, `messages`, `response`, `label` and `metadata`.
    The reply is a number, or an object with a `score`."""
    remote_key_variable: str | None = None
    """Environment variable with the key of that service, which is sent as a bearer token; name it in
    `reward_environment`, too. `none`: no key."""
    judge_url: Url | None = None
    """Base URL of the OpenAI-compatible API that `judge` asks, such as `http://judge:8000/v1`."""
    judge_key_variable: str | None = None
    """Environment variable with the key of that API; name it in `reward_environment`, too. `none`: no key."""
    judge_model: str | None = None
    """Name of the judge's model."""
    judge_prompt: str | None = None
    """What the judge is asked: a text in which `{prompt}`, `{response}` and `{label}` are replaced."""
    judge_scores: dict[str, float] = {}
    """Score of each word or letter that the judge may choose, such as `{ A = 1, B = 0 }`; by default, a number."""
    judge_arguments: dict[str, Any] = {}
    """Further fields of a request to the judge, such as `{ temperature = 0, max_tokens = 512 }`."""
    judge_default: float | None = None
    """Score of a response where the judge's reply has no score twice; `none`: that is an error."""
    service_requests: PositiveInt = 64
    """Number of requests of `remote`, and of `judge`, that a reward process sends at the same time; others wait."""

    @property
    def terms(self) -> list[RewardTerm]:
        """All reward functions of training."""
        first = RewardTerm(rm_type=self.rm_type, reward_weight=self.reward_weight, reward_batched=self.reward_batched)
        return [first, *self.further]


@rule(ERRORS)
def _rewards_have_names(s: Settings) -> Messages:
    names = Counter(name.rpartition(":")[2] for name in (s.rm_type, *(term.rm_type for term in s.further)))
    for name, count in names.items():
        if count > 1:
            yield f"reward.further: {count} reward functions are called {name!r}; rename one, or add their weights"


def scores_by(s: Settings, name: str) -> bool:
    """Whether any response of a run, held-out sets included, is scored by the built-in reward ``name``."""
    return name in (s.rm_type, *(term.rm_type for term in s.further), *(one.rm_type for one in s.sets))


@rule(ERRORS)
def _services_are_named(s: Settings) -> Messages:
    needed = {"remote": ("remote_url",), "judge": ("judge_url", "judge_model", "judge_prompt")}
    for name, settings in needed.items():
        for setting in settings if scores_by(s, name) else ():
            if not s[setting]:
                yield f"reward.{setting}: is required by the reward {name!r}"
        variable = s[f"{name}_key_variable"]
        if variable is not None and variable not in s.reward_environment:
            yield f"reward.{name}_key_variable: add {variable} to reward.reward_environment, which lets rewards see it"
    if s.judge_prompt and "{response}" not in s.judge_prompt:
        yield "reward.judge_prompt: has no {response}; write it where the response belongs"


@rule(FILES)
def _keys_are_set(s: Settings) -> Messages:
    for setting in ("remote_key_variable", "judge_key_variable"):
        if s[setting] is not None and s[setting] not in os.environ:
            yield f"reward.{setting}: the environment has no variable {s[setting]}; export it"


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
