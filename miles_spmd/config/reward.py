"""`[reward]`: what scores responses."""

import os
import re
from collections import Counter
from typing import Annotated, Any

from miles_spmd.config.checks import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.config.model import Checkpoint
from miles_spmd.config.table import NonNegativeInt, PositiveFloat, PositiveInt, Seconds, Table, must_be, plug_point

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
    judge_reader: Annotated[str, plug_point()] | None = None
    """Plug point: reads the score in a judge's reply, in the place of `judge_scores` and what is
    looked for otherwise."""
    judge_arguments: dict[str, Any] = {}
    """Further fields of a request to the judge, such as `{ temperature = 0, max_tokens = 512 }`."""
    judge_hf_checkpoint: Checkpoint | None = None
    """Checkpoint folder of a judge that engines of this run hold, instead of `judge_url`; a model of the Hub, and
    `random:...`, as `model.hf_checkpoint`. It needs a chat template."""
    judge_num_gpus: NonNegativeInt = 0
    """The last so many ranks hold engines of `judge_hf_checkpoint` on devices of their own, and do nothing else."""
    judge_sglang: dict[str, Any] = {}
    """Fields of SGLang's ServerArgs for these engines, such as `{ tp_size = 2 }`; those of `[sglang]` are the policy's.
    """
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
    service = () if s.judge_hf_checkpoint is not None or s.judge_num_gpus else ("judge_url", "judge_model")
    needed = {"remote": ("remote_url",), "judge": (*service, "judge_prompt")}
    for name, settings in needed.items():
        for setting in settings if scores_by(s, name) else ():
            if not s[setting]:
                instead = ", or judge_hf_checkpoint" if setting == "judge_url" else ""
                yield f"reward.{setting}: is required by the reward {name!r}{instead}"
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
