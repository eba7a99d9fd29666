"""The plug point of ``[environment]``: a conversation of the policy with whatever it acts upon.

``environment.environment = "module:function"`` names an ``async def`` of the signature of :class:`Environment`. It runs
in one event loop with others like it, in a process of its own (docs/environments.md). It is the user's code with the
user's rights: its process is not a sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Trajectory


class EnvironmentSetupError(RuntimeError):
    """An environment that cannot be imported or called. The message gives setting, name and cause."""


class Completion(NamedTuple):
    """What the policy has sampled: the last segment of the trajectory that it continues."""

    tokens: list[int]  # the one that stopped it included
    finish_reason: FinishReason
    log_probs: list[float] = []  # of the tokens, where they were asked for
    weight_versions: list[tuple[int, int]] = []  # (version, number of tokens), in order; of a server


class Session(Protocol):
    """An address at which code that is not ours speaks with the policy, as long as the session is open."""

    base_url: str
    """What an OpenAI client takes by this name: it ends with ``/v1``."""
    api_key: str
    """Admits to this session alone."""

    @property
    def trajectories(self) -> list[Trajectory]:
        """What the conversations have become, siblings: one that was only continued is one trajectory, and each branch
        one more; those with most turns first. Empty where the policy was asked for nothing."""
        ...


class Context(Protocol):
    """What an environment may do. One context belongs to one call of the environment."""

    index: int
    """Number of the sample among those of its prompt."""

    def begin(self, tokens: Sequence[int], *, role: str = "") -> Trajectory:
        """Return a new trajectory that begins with ``tokens``: the prompt's, or those of a sub-agent or another player.

        ``role`` names the player whose trajectory it is, where there are several: printable text."""
        ...

    def fork(self, trajectory: Trajectory) -> Trajectory:
        """Return a sibling that has grown as ``trajectory`` has, and from now on grows by itself."""
        ...

    async def complete(
        self,
        trajectory: Trajectory,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        path: str = "",
        log_probs: bool = False,
    ) -> Completion:
        """Let the policy continue ``trajectory``, and append what it samples.

        The sampling parameters are those of ``[rollout]``; ``max_new_tokens`` (default: what is left of
        ``rollout_max_response_len``) can only lower the limit, ``stop`` adds strings. The seed follows from run, step,
        prompt, sample, trajectory and turn; ``path`` names the turn in place of the last two, where the order of
        trajectories depends on time. ``log_probs``: whether the completion has them. Where no token fits into the
        context or the limit, the completion is empty, with the reason LENGTH.
        """
        ...

    def room(self, trajectory: Trajectory) -> int:
        """Return how many tokens can still be appended or sampled."""
        ...

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the text of a conversation by the checkpoint's chat template, with the variables that the run and the
        prompt's row have for it. Raises ValueError where the template refuses it."""
        ...

    def encode(
        self,
        text: str,
        *,
        literal: Sequence[tuple[int, int]] = (),
        at_start: bool = False,
        templated: bool = True,
    ) -> list[int]:
        """Return the tokens of a text that continues another one, or begins a context (``at_start``): a text that a
        chat template has written, or else (``templated``) one that gets the tokens which the tokenizer puts before it.

        What spells a special token becomes one, except in ``literal``: ranges of characters of others, such as the
        result of a tool, each with its first character and the first one behind it."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, with the special ones."""
        ...

    def session(
        self, *, call_format: str = "auto", reasoning_format: str = "auto"
    ) -> AbstractAsyncContextManager[Session]:
        """Open a session for ``async with``. Formats are SGLang's names, or found by what the chat template writes."""
        ...

    def count(self, name: str, value: float = 1.0) -> None:
        """Add ``value`` to the metric ``env/name`` of the step, which is a mean over samples."""
        ...


class Leaf(NamedTuple):
    """One of the trajectories that an episode has come to."""

    trajectory: (
        Trajectory  # with what the environment has given it: text, messages, reward; reward functions come later
    )
    order: int  # of its last response among those of the episode, as the policy was asked for them


class LeafSelector(Protocol):
    """``environment.trained_leaves``: chooses which of the siblings of a rollout the loss counts. It runs on the
    controller, as soon as the environment has returned, for rollouts that have more than one, and not in evaluations.
    """

    def __call__(self, leaves: Sequence[Leaf]) -> Sequence[int]:
        """Return the numbers of those that are trained, at least one. ``leaves`` stand in the order in which the
        environment has returned them, those of a session with most turns first.

        The others keep their place in rewards, transcripts and ledger. What they have in common with one that is
        chosen is trained there."""
        ...


class Environment(Protocol):
    """Returns the trajectories to train on: one, or siblings, which share a reward, or those of several roles, each of
    which has a reward of its own. A function may have further parameters, which ``environment.environment_kwargs``
    sets; its attribute ``check``, if it has one, is called with them when a process starts, and raises ValueError for
    what cannot be used.

    Where the first trajectory of a role has a ``reward``, it counts for all siblings, in place of that of the reward
    functions, which are given the first one. So does the sum over the turns where only these have one
    (``Trajectory.reward_turn``). What siblings have in common is trained once, in the first that has it.
    """

    async def __call__(self, context: Context, prompt: Prompt) -> Trajectory | Sequence[Trajectory]: ...
