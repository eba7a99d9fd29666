"""A context whose trajectories are held here, with all that the engines say about them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from miles_spmd.environments.context import EpisodeContext, ModelView
from miles_spmd.environments.messages import Ask, Begin, Completed
from miles_spmd.environments.sessions.protocol import RequestError
from miles_spmd.plugins.environment import Completion
from miles_spmd.types.request import Output, Request, SamplingParams
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory

Submit = Callable[[Request], Awaitable[Output]]


class ServedContext(EpisodeContext):
    """That of conversation ``number``, whose requests go to one engine. A segment that the policy samples has log-probs
    and weight versions."""

    def __init__(
        self,
        number: int,
        model: ModelView,
        variables: Mapping[str, Any],
        params: SamplingParams,
        seed_of: Callable[[str], int],
        submit: Submit,
    ) -> None:
        """``variables``: of the chat template. ``params``: of each request; ``max_new_tokens`` is the limit of a
        trajectory behind its start. ``seed_of`` returns a turn's seed by its path."""
        prompt = Prompt("", "", [], metadata={"chat_template_kwargs": dict(variables)})
        super().__init__(Begin(number, prompt, 0, params.max_new_tokens), model, _nobody)
        self._params, self._seed_of, self._submit = params, seed_of, submit
        self._number, self._requests = number, itertools.count()

    @property
    def counts(self) -> dict[str, float]:
        """What was counted so far."""
        return self._metrics

    async def complete(
        self,
        trajectory: Trajectory,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        path: str = "",
        log_probs: bool = False,
    ) -> Completion:
        """Raises RequestError where the request was stopped, for another one to be made."""
        limit = min(self.room(trajectory), math.inf if max_new_tokens is None else max_new_tokens)
        if limit < 1:
            return Completion([], FinishReason.LENGTH)
        own = {"max_new_tokens": int(limit), "stop": [*self._params.stop, *stop], "seed": self._seed_of(path)}
        rid = f"{self._number}.{next(self._requests)}"
        output = await self._submit(Request(rid, trajectory.tokens, msgspec.structs.replace(self._params, **own)))
        if output.finish_reason is FinishReason.ABORT:
            raise RequestError(503, "the request was stopped, because weights were loaded; send it again", "stopped")
        ids, versions = output.output_ids, output.weight_versions
        trajectory.append(Segment(ids, log_probs=output.output_log_probs, weight_versions=versions, path=path))
        trajectory.finish_reason = output.finish_reason
        return Completion(ids, output.finish_reason, output.output_log_probs if log_probs else [], versions)


async def _nobody(ask: Ask) -> Completed:
    raise NotImplementedError
