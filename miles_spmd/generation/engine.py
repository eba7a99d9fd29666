"""What a rollout engine is: requests in, steps, finished outputs out. In process, no server, no socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from miles_spmd.types.request import Output, Request

if TYPE_CHECKING:
    import torch

    from miles_spmd.models.layout import TensorLayout


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
