"""What a rollout engine is: requests in, steps, finished outputs out. In process, no server, no socket."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from miles_spmd.data.sample import FinishReason

if TYPE_CHECKING:
    import torch

    from miles_spmd.models.layout import TensorLayout


class SamplingParams(msgspec.Struct, frozen=True):
    """How to draw one answer.

    Each token is drawn from ``softmax(logits / temperature)``, cut to its ``top_k`` likeliest tokens and to the
    smallest set of probability at least ``top_p`` (:func:`~miles_spmd.algorithms.truncation.threshold`), and
    renormalised. The draw is a function of ``seed``, the token's position in the sequence and that distribution alone,
    not of what else is in the batch.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 (anything below 1e-6): greedy, the likeliest token
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary; 1: greedy
    stop: list[str] = []  # the answer ends with the token that completes one of these strings
    stop_token_ids: list[int] = []  # besides the model's own end-of-sequence tokens
    ignore_eos: bool = False  # neither end-of-sequence nor stop tokens end the answer; stop strings do
    seed: int = 0  # 63-bit, a pure function of (run seed, step, prompt, sample, turn)


class Request(msgspec.Struct, frozen=True):
    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    return_prompt_log_probs: bool = False
    return_likeliest: bool = False


class Output(msgspec.Struct):
    """A finished (or aborted) request.

    ``output_ids`` ends with the token that stopped it, if one did. ``output_log_probs`` is aligned with it: the natural
    log of each token's probability in the distribution that it was drawn from, after top-k and top-p; for a greedy
    request, which draws nothing, in ``softmax(logits / temperature)`` over the whole vocabulary (at temperature 1 if it
    asks for 0). It is what a trainer that treats its logits in the same way computes for the token.
    """

    rid: str
    output_ids: list[int]
    output_log_probs: list[float]
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int]]  # (version, number of tokens), in order
    prompt_log_probs: list[float] | None = None  # of input_ids[1:] at temperature 1, when asked for
    likeliest_ids: list[int] | None = None  # in the place of each of output_ids; of equally likely ones the lowest


class EngineMemory(NamedTuple):
    """Bytes on the device."""

    weights: int
    kv_cache: int
    graphs: int = 0  # CUDA graphs and what they compute in


class Engine(Protocol):
    """One rank of an engine. With tensor parallelism all its ranks make the same calls in the same order; only the
    content of the leader's ``submit`` and ``abort`` counts, and every rank gets the outputs."""

    @property
    def weight_version(self) -> int:
        """Of the weights that produce tokens now; -1 before the first ``commit``."""

    @property
    def leader(self) -> bool:
        """Whether this rank's ``submit`` and ``abort`` count."""

    def submit(self, requests: list[Request]) -> None:
        """Queue requests; they start at the next ``step``.

        Raises ValueError naming the rid of a request that cannot be served: prompt plus ``max_new_tokens`` exceeds the
        context, the rid is in use, a parameter is out of range. Nothing of the list is queued then.
        """

    def step(self) -> list[Output]:
        """Run one scheduler iteration (a prefill or a decode of the running batch); return what finished.

        Raises FloatingPointError when the model produced a log-prob that is not finite.
        """

    def abort(self, rids: list[str] | None = None) -> None:
        """Stop the named requests (None: all). They come out of a later ``step`` as ABORT with their tokens so far.
        Rids that are not in the engine are ignored: they may just have finished."""

    def retry_smaller(self) -> int | None:
        """After a ``step`` that ran out of memory: forget what it was doing, and begin again with the unfinished
        requests, half as many at a time as then, from now on. Their draws are functions of their seeds, so they are
        drawn alike.

        Returns how many may run now; None, with nothing changed, where that cannot be: one request alone was too
        much, or other ranks are in the middle of the same step.
        """

    @property
    def idle(self) -> bool:
        """True, on every rank alike, when nothing is queued, running or waiting to be returned."""

    def pause(self) -> None:
        """Make ``step`` a no-op until ``unpause``; requests and cache stay. With requests in flight, weights may be
        written only then."""

    def unpause(self) -> None: ...

    def flush(self) -> None:
        """Drop the prefix cache. Raises RuntimeError unless idle."""

    def release(self, keep_weights: bool = False) -> None:
        """Give the memory of weights and KV cache back; contents are lost. Raises RuntimeError unless idle. With
        ``keep_weights`` those stay, and can be generated with again after ``resume``.

        Until ``resume``, ``step`` and another ``release`` raise RuntimeError too.
        """

    def resume_weights(self) -> None:
        """Take the memory of the weights again, and no other: a refit needs no more, and until then a trainer may want
        the rest. ``resume`` follows."""

    def resume(self) -> None:
        """Take all memory again that is still released. Weights that were not kept are undefined until the next
        refit. Raises MemoryError, as ``resume_weights`` does, when there is not enough."""

    def memory(self) -> EngineMemory:
        """What it holds now, without what is released."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The engine's own parameter storage on this rank by its own names; writing into it changes the model."""

    def layout(self) -> list[TensorLayout]:
        """Where every part of every tensor of ``weights`` comes from, in checkpoint coordinates."""

    def commit(self, version: int) -> None:
        """Tell the engine that its weights now are ``version``: drop the cache, stamp later tokens with it.

        Requests in flight go on: what they have so far is kept and its keys and values are recomputed under the new
        weights.
        """

    def close(self) -> None:
        """Free everything that the engine holds in this process. All ranks of the world do it together."""


def check_request(request: Request, context_length: int) -> None:
    """Raise ValueError naming the rid and everything that keeps the request from being served."""
    prompt, wanted = len(request.input_ids), request.sampling
    problems = []
    if prompt < 1 or wanted.max_new_tokens < 1:
        problems.append(f"needs at least one token of prompt ({prompt}) and of answer ({wanted.max_new_tokens})")
    if prompt + wanted.max_new_tokens > context_length:
        problems.append(f"{prompt} prompt + {wanted.max_new_tokens} new tokens exceed the context of {context_length}")
    if not 0 <= wanted.temperature < math.inf:
        problems.append(f"temperature {wanted.temperature} must be finite and not negative")
    if not 0 < wanted.top_p <= 1:
        problems.append(f"top_p {wanted.top_p} must be in (0, 1]")
    if wanted.top_k != -1 and wanted.top_k < 1:
        problems.append(f"top_k {wanted.top_k} must be positive, or -1 for the whole vocabulary")
    if problems:
        raise ValueError(f"request {request.rid}: " + "; ".join(problems))
