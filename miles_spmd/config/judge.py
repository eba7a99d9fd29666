"""The judge of `[reward]` that engines of this run hold: what it is asked with, and what its settings must not say."""

from typing import Annotated

from pydantic import Field, ValidationError

from miles_spmd.config.backends import BackendMissingError, backend_fields, refusal, value_error
from miles_spmd.config.checks import ERRORS, FILES, WARNINGS, Messages, Settings, checkpoint_shape, heads_divide, rule
from miles_spmd.config.data import TemplateArguments, evaluates
from miles_spmd.config.model import folder_errors
from miles_spmd.config.overrides import hint, nearest
from miles_spmd.config.reward import scores_by
from miles_spmd.config.table import PositiveInt, Table, Temperature, TopK


class JudgeArguments(Table):
    """The fields of a chat completion's request that engines of this run understand. They have the names and defaults
    of the OpenAI-compatible API, except for ``max_tokens``."""

    temperature: Temperature = 1.0
    """Sampling temperature; 0 always takes the top-1 token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this."""
    top_k: TopK = -1
    """Sample from so many most probable tokens; -1: from the whole vocabulary."""
    max_tokens: PositiveInt = 1024
    """Longest reply in tokens."""
    stop: str | list[str] = []
    """Texts at which a reply ends."""
    chat_template_kwargs: TemplateArguments = {}
    """Further variables of the judge's chat template, such as `{ enable_thinking = false }`."""

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


@rule(ERRORS)
def _there_is_one_judge(s: Settings) -> Messages:
    if s.judge_hf_checkpoint is None:
        if s.judge_num_gpus:
            yield "reward.judge_hf_checkpoint: is required by judge_num_gpus: name the model that these ranks hold"
        return
    if s.judge_url is not None:
        yield "reward.judge_url: is another judge than that of judge_hf_checkpoint; leave out one of the two"
    if not s.judge_num_gpus:
        yield "reward.judge_num_gpus: must be at least 1: the judge of judge_hf_checkpoint has ranks of its own"


@rule(ERRORS)
def _ranks_remain_for_the_policy(s: Settings) -> Messages:
    if s.judge_num_gpus and s.rollout_num_gpus < s.world_size <= s.judge_num_gpus + s.rollout_num_gpus:
        generating = f" and rollout_num_gpus = {s.rollout_num_gpus}" if s.rollout_num_gpus else ""
        yield f"reward.judge_num_gpus: {s.judge_num_gpus}{generating} of {s.world_size} ranks leave none to train"


@rule(ERRORS)
def _what_judges_do_not_do(s: Settings) -> Messages:
    if not s.judge_num_gpus:
        return
    if s.cells > 1:
        yield "reward.judge_num_gpus: must be 0 with resilience.cells > 1: all ranks of a cell train and generate"
    if s.mode in ("dpo", "rm"):
        yield f"reward.judge_num_gpus: must be 0, because this run of mode {s.mode!r} generates nothing"


@rule(ERRORS)
def _judges_fill_their_ranks(s: Settings) -> Messages:
    size = s.judge_sglang.get("tp_size", 1)
    if not isinstance(size, int) or size < 1:
        return  # reported below
    if s.judge_num_gpus % size:
        yield (
            f"reward.judge_sglang: engines of tp_size = {size} ranks do not divide the judge_num_gpus = "
            f"{s.judge_num_gpus} ranks that judge"
        )
    shape = None if s.judge_hf_checkpoint is None else checkpoint_shape(s.judge_hf_checkpoint)
    if shape is not None:
        yield from heads_divide("reward.judge_sglang: tp_size", size, shape)


@rule(ERRORS)
def _engines_have_these_settings(s: Settings) -> Messages:
    try:
        fields = backend_fields("sglang")
    except BackendMissingError:
        return  # reported with [sglang]
    for key, value in s.judge_sglang.items():
        problem = refusal("sglang", key)
        if problem is None and key not in fields:
            problem = f"unknown key{hint(nearest(key, fields))}"
        elif problem is None:
            problem = value_error("sglang", key, value)
        if problem is not None:
            yield f"reward.judge_sglang: {key}: {problem}"


@rule(ERRORS)
def _engines_understand_the_arguments(s: Settings) -> Messages:
    if s.judge_hf_checkpoint is None:
        return  # a service has fields of its own
    try:
        JudgeArguments.model_validate(s.judge_arguments, strict=True)
    except ValidationError as error:
        for detail in error.errors():
            name, message = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                known = ", ".join(JudgeArguments.model_fields)
                message = f"engines of this run do not have it; they have {known}"
            yield f"reward.judge_arguments: {name}: {message}"


@rule(WARNINGS)
def _idle_judges(s: Settings) -> Messages:
    if s.judge_num_gpus and s.mode in ("rl", "sft") and not (s.mode == "rl" or evaluates(s)):
        yield "reward.judge_num_gpus: these ranks stay idle, because this run generates nothing"
    elif s.judge_num_gpus and not scores_by(s, "judge"):
        yield "reward.judge_num_gpus: these ranks stay idle, because no reward is 'judge'"


@rule(FILES)
def _judge_checkpoint(s: Settings) -> Messages:
    if s.judge_hf_checkpoint is not None:
        yield from folder_errors("reward.judge_hf_checkpoint", s.judge_hf_checkpoint)
