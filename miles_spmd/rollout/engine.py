"""What a rollout engine is: requests in, steps, finished outputs out. In process, no server, no socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from miles_spmd.data.sample import FinishReason

if TYPE_CHECKING:
    import torch

    from miles_spmd.models.layout import TensorLayout


class SamplingParams(msgspec.Struct, frozen=True):
    """How to draw one answer. Log-probs are always those of the unscaled T = ``temperature`` distribution's token."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    seed: int = 0  # 63-bit, a pure function of (run seed, step, prompt, sample, turn)


class Request(msgspec.Struct, frozen=True):
    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    return_prompt_log_probs: bool = False


class Output(msgspec.Struct):
    """A finished (or aborted) request. ``output_log_probs`` is aligned with ``output_ids``, natural log."""

    rid: str
    output_ids: list[int]
    output_log_probs: list[float]
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int]]  # (version, number of tokens), in order
    prompt_log_probs: list[float] | None = None  # of input_ids[1:], when asked for


class Engine(Protocol):
    """One rank of an engine. With tensor parallelism all its ranks make the same calls in the same order; only the
    leader's ``submit`` and ``abort`` count, and every rank gets the outputs."""

    weight_version: int

    def submit(self, requests: list[Request]) -> None:
        """Queue requests. Raises ValueError naming the rid when prompt + max_new_tokens exceeds the context."""

    def step(self) -> list[Output]:
        """Run one scheduler iteration (a prefill or a decode of the running batch); return what finished."""

    def abort(self, rids: list[str] | None = None) -> None:
        """Stop the named requests (None: all). They come out of a later ``step`` as ABORT with their tokens so far."""

    @property
    def idle(self) -> bool:
        """True, on every rank alike, when nothing is queued, running or waiting to be returned."""

    def pause(self) -> None:
        """Make ``step`` a no-op until ``unpause``; requests and cache stay."""

    def unpause(self) -> None: ...

    def flush(self) -> None:
        """Drop the prefix cache. Needs an idle engine."""

    def release(self) -> None:
        """Give the memory of weights and KV cache back. Needs an idle engine; contents are lost."""

    def resume(self) -> None:
        """Take the memory again. Weights are undefined until the next refit."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The engine's own parameter storage on this rank by its own names; writing into it changes the model."""

    def layout(self) -> list[TensorLayout]:
        """Where every part of every tensor of ``weights`` comes from, in checkpoint coordinates."""

    def commit(self, version: int) -> None:
        """Tell the engine that its weights now are ``version``: flush the cache, stamp later tokens with it."""
