"""The interface of a rollout engine: requests in, steps, finished outputs out. In process, without server or socket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.types.request import Output, Request

if TYPE_CHECKING:
    import torch

    from miles_spmd.models.layout import TensorLayout


class EngineMemory(NamedTuple):
    """Bytes on the device."""

    weights: int
    kv_cache: int
    graphs: int = 0  # CUDA graphs and the buffers that they compute in


class Engine(Protocol):
    """One rank of an engine. With tensor parallelism all its ranks make the same calls in the same order; only the
    content of the leader's ``submit`` and ``abort`` counts, and every rank gets the outputs."""

    @property
    def size(self) -> int:
        """Number of consecutive ranks of the world that form this engine; it divides the world's size."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that generate tokens now; -1 before the first ``commit``."""

    @property
    def leader(self) -> bool:
        """Whether this rank's ``submit`` and ``abort`` count; the first rank of each engine is its leader."""

    @property
    def cache_tokens(self) -> int | None:
        """Number of tokens whose keys and values the engine can hold, those of finished requests included; None where
        it keeps nothing of a request for later ones."""

    def submit(self, requests: list[Request]) -> None:
        """Queue requests; they start at the next ``step``, those of lower ``order`` first where not all can. The output
        of one that is ``begun`` has the tokens that it began with, too, and is that of the same request from its start.

        Raises ValueError naming the rid of a request that cannot be served: prompt plus ``max_new_tokens`` exceeds the
        context, the rid is in use, a parameter is out of range. Nothing of the list is queued then.
        """

    def step(self) -> list[Output]:
        """Run one scheduler iteration (a prefill or a decode of the running batch); return the finished outputs.

        Raises FloatingPointError when the model produced a log-prob that is not finite.
        """

    def abort(self, rids: list[str] | None = None) -> None:
        """Stop the named requests (None: all). A later ``step`` returns them as ABORT with their tokens so far.
        Rids that are not in the engine are ignored: they may just have finished."""

    def retry_smaller(self) -> int | None:
        """Recover from a ``step`` that ran out of memory: drop all running state and start the unfinished requests
        again, from now on with half as many running at a time. Sampling depends on a request's seed only, so that the
        same tokens are sampled again.

        Returns the new limit of running requests. Returns None and changes nothing when no smaller limit is possible:
        only one request was running, or other ranks are in the middle of the same step.
        """

    @property
    def idle(self) -> bool:
        """True when nothing is queued, running or waiting to be returned; equal on all ranks of the engine."""

    def pause(self) -> None:
        """Make ``step`` a no-op until ``unpause``; requests and cache stay. With requests in flight, weights may be
        written only while paused."""

    def unpause(self) -> None: ...

    def flush(self) -> None:
        """Drop the prefix cache. Raises RuntimeError unless idle."""

    def release(self, keep_weights: bool = False) -> None:
        """Release the memory of weights, KV cache and CUDA graphs; contents are lost. With ``keep_weights`` the weights
        stay and are valid after ``resume``. Raises RuntimeError unless idle.

        Until ``resume``, ``step`` and another ``release`` raise RuntimeError too.
        """

    def resume_weights(self) -> None:
        """Resume the memory of the weights only. A refit needs no more, and the trainer can use the rest until
        ``resume``."""

    def resume(self) -> None:
        """Resume all memory that is still released. Weights that were not kept are undefined until the next refit.

        Raises MemoryError, as ``resume_weights`` does, when there is not enough memory.
        """

    def memory(self) -> EngineMemory:
        """Return the memory that the engine holds now; released memory counts as 0."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Return this rank's parameters by the engine's own names; writing into the tensors changes the model."""

    def layout(self) -> list[TensorLayout]:
        """Return where every part of every tensor of ``weights`` comes from, in checkpoint coordinates."""

    def commit(self, version: int) -> None:
        """Declare that the weights now are ``version``: drop the cache and attribute later tokens to it.

        Requests in flight continue: their tokens so far are kept, and the keys and values of these are recomputed with
        the new weights.
        """

    def close(self) -> None:
        """Free everything that the engine holds in this process. All ranks of the world call it together."""


class EngineFactory(Protocol):
    """Plug point ``rollout.engine = "module:function"``: builds an engine that is not SGLang. A class whose constructor
    has this signature is a factory, too.

    All ranks that generate call it at the same time, with torch.distributed initialised. The weights of the engine may
    be random: a refit comes before the first request.
    """

    def __call__(self, model_path: Path, *, dtype: str, context_length: int | None) -> Engine:
        """``model_path``: the Hugging Face checkpoint folder; its safetensors need not be read. ``dtype``: "float32" or
        "bfloat16". ``context_length``: the longest prompt plus response, ``sglang.context_length``; None: that of the
        model."""
        ...


FACTORIES: PlugPoint[EngineFactory] = PlugPoint("rollout.engine", {}, EngineFactory)
