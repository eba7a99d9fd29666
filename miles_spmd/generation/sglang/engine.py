"""The rollout engine: SGLang in this process, under the host's torch.distributed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pkgutil
import random
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sglang.srt import runtime_context
from sglang.srt.constants import (
    GPU_MEMORY_ALL_TYPES,
    GPU_MEMORY_TYPE_CUDA_GRAPH,
    GPU_MEMORY_TYPE_KV_CACHE,
    GPU_MEMORY_TYPE_WEIGHTS,
)
from sglang.srt.managers.io_struct import (
    AbortReq,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.model_executor import input_buffers
from sglang.srt.sampling.sampling_params import SamplingParams as SglangSamplingParams
from sglang.srt.server_args import set_global_server_args_for_scheduler

from miles_spmd.generation import storage
from miles_spmd.generation.engine import EngineMemory
from miles_spmd.generation.sglang import (
    cpu_attention,
    experts,
    float32,
    sampler,
    shared_functions,
    split_attention_backend,
    world,
)
from miles_spmd.generation.sglang.scheduler import InProcessScheduler
from miles_spmd.generation.sglang.server_args import build_server_args
from miles_spmd.models import FAMILIES, TensorLayout, load_family
from miles_spmd.platform import cuda
from miles_spmd.platform.cpu import sglang_shim
from miles_spmd.types.request import Output, Request, check_request
from miles_spmd.types.sample import FinishReason

sglang_shim.check_version()

# SGLang aborts every request whose rid begins with the given one. Rids that end in this begin no other.
_END = "\0"

_PARTS = (GPU_MEMORY_TYPE_WEIGHTS, GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_CUDA_GRAPH)  # as in EngineMemory


class SglangEngine:
    """One rank of an :class:`~miles_spmd.generation.engine.Engine` of ``tp_size`` consecutive ranks of the world.

    All ranks of the world build theirs at the same time. A process holds one at a time; ``close`` makes room for
    another. Weights are random until the first refit.

    ``idle`` needs no collective: it is derived from SGLang's queues and batches, which are the same on every rank
    because they follow from the leader's broadcast messages and from sampled tokens, and every rank draws the same
    tokens from the same gathered logits. What was submitted and is not yet broadcast counts through ``_touched``, which
    every rank sets, whatever it was given.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str,
        server_args: dict[str, Any] | None = None,
        context_length: int | None = None,
        cache_tokens: int | None = None,
        invariant: bool = False,
        sum_terms: int = 1,
    ) -> None:
        """``dtype``: "float32" or "bfloat16". ``server_args``: fields of SGLang's ServerArgs, among them ``tp_size``.
        ``context_length``: the longest prompt plus answer, by default the model's. ``cache_tokens``: no use is made of
        a KV cache for more; how many it has then depends on ``server_args`` and on what is free.
        ``invariant``: compute with :mod:`miles_spmd.invariant`, so that no answer depends on what else is in the batch;
        what ranks add up are then ``sum_terms`` terms, at least one of each.

        Raises ValueError for settings that SGLang does not have or that this engine decides itself.
        """
        self._family = load_family(model_path)
        self.context_length = context_length or self._family.max_sequence_length
        table = server_args or {}
        logging.getLogger("sglang").setLevel(table.get("log_level", "error").upper())
        args = build_server_args(str(model_path), dtype, self.context_length, table, cache_tokens, invariant)
        self.tp_size = args.tp_size
        self.tp_rank = dist.get_rank() % args.tp_size
        sampler.register()
        if args.device == "cpu":
            cpu_attention.register()
            sglang_shim.adapt()
        else:
            cuda.require_memory_saver()
            experts.register()
            split_attention_backend.register(invariant)
        _import_no_other_models()
        plain = args.device == "cuda" and dtype == "float32"
        kernels = shared_functions.shared_kernels(invariant or args.device == "cpu", sum_terms)
        with _keep_random_state(), kernels, float32.plain_kernels() if plain else contextlib.nullcontext():
            set_global_server_args_for_scheduler(args)
            world.join(args.tp_size)
            device_index = torch.cuda.current_device() if args.device == "cuda" else 0
            self._scheduler = InProcessScheduler(args, device_index, self.tp_rank)
        self._weight_version = -1
        self._paused = False
        self._touched = False
        self._released: list[str] = []  # SGLang's names of the parts of its memory
        self._live: dict[str, Request] = {}
        self._aborted: set[str] = set()
        self._spans: dict[str, list[tuple[int, int]]] = defaultdict(list)  # rid -> (version, tokens up to its end)

    @property
    def weight_version(self) -> int:
        return self._weight_version

    @property
    def leader(self) -> bool:
        return self.tp_rank == 0

    # --- requests --------------------------------------------------------------------------------------------------

    def submit(self, requests: list[Request]) -> None:
        if self.leader:
            messages = [self._message(request) for request in requests]
            rids = [request.rid for request in requests]
            for rid in rids:
                if rid in self._live or rids.count(rid) > 1:
                    raise ValueError(f"request {rid}: another request with this rid is in the engine")
            self._live |= {request.rid: request for request in requests}
            self._scheduler.inbox += messages
        self._touched = True

    def _message(self, request: Request) -> TokenizedGenerateReqInput:
        """What SGLang's tokenizer process would send."""
        self._check(request)
        wanted = request.sampling
        params = SglangSamplingParams(
            max_new_tokens=wanted.max_new_tokens,
            stop=wanted.stop,
            stop_token_ids=set(wanted.stop_token_ids),
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            ignore_eos=wanted.ignore_eos,
            sampling_seed=wanted.seed,
        )
        params.normalize(self._scheduler.tokenizer)
        return TokenizedGenerateReqInput(
            rid=request.rid + _END,
            input_text=None,
            input_ids=array("q", request.input_ids),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=True,
            logprob_start_len=0 if request.return_prompt_log_probs else -1,
            top_logprobs_num=int(request.return_top1),
            token_ids_logprob=None,
            stream=False,
        )

    def _check(self, request: Request) -> None:
        check_request(request, self.context_length)
        if request.sampling.stop and self._scheduler.tokenizer is None:
            raise ValueError(f"request {request.rid}: stop strings need a tokenizer in the checkpoint folder")
        prompt, answer = len(request.input_ids), request.sampling.max_new_tokens
        page, cache = self._scheduler.page_size, self._scheduler.max_total_num_tokens
        if -(-prompt // page) * page + answer + page >= cache:  # it would wait for ever
            raise ValueError(
                f"request {request.rid}: {prompt} prompt + {answer} new tokens do not fit SGLang's cache of {cache} "
                "tokens; raise sglang.max_total_tokens or mem_fraction_static"
            )

    def abort(self, rids: list[str] | None = None) -> None:
        if self.leader:
            self._aborted |= {*self._live} if rids is None else {rid for rid in rids if rid in self._live}
            self._scheduler.inbox += [AbortReq(abort_all=True)] if rids is None else self._abort_messages(rids)
        self._touched = True

    def _abort_messages(self, rids: Iterable[str]) -> list[AbortReq]:
        return [AbortReq(rid=rid + _END) for rid in rids if rid in self._live]

    def step(self) -> list[Output]:
        self._require_memory()
        if self._paused:
            return []
        self._scheduler.step()
        self._touched = False
        outputs = [self._output(req) for req in self._scheduler.finished]
        self._scheduler.finished.clear()
        for output in outputs:
            self._live.pop(output.rid, None)
            self._aborted.discard(output.rid)
        return outputs

    def retry_smaller(self) -> int | None:
        if self.tp_size > 1 or (limit := self._scheduler.halve()) is None:
            return None
        self._scheduler.forget()
        ended = {req.rid.removesuffix(_END) for req in self._scheduler.finished}
        again = [request for rid, request in self._live.items() if rid not in ended]
        for request in again:
            self._spans.pop(request.rid + _END, None)
        self._scheduler.inbox[:] = [*map(self._message, again), *self._abort_messages(sorted(self._aborted))]
        self._touched = True
        return limit

    def _output(self, req: Req) -> Output:
        rid = req.rid.removesuffix(_END)
        ids = list(req.output_ids_through_stop)
        log_probs = req.logprob.output_token_logprobs_val[: len(ids)]
        prompt, top1 = req.logprob.input_token_logprobs_val, req.logprob.output_top_logprobs_idx
        if not all(map(math.isfinite, log_probs)):
            raise FloatingPointError(
                f"request {rid}: the model of weight version {self._weight_version} gives log-probs that are not finite"
            )
        return Output(
            rid=rid,
            output_ids=ids,
            output_log_probs=log_probs,
            finish_reason=_finish_reason(req),
            weight_versions=self._weight_versions(req.rid, len(ids)),
            prompt_log_probs=prompt[1:] if prompt else None,
            top1_ids=[token for (token,) in top1[: len(ids)]] if top1 else None,
        )

    def _weight_versions(self, rid: str, tokens: int) -> list[tuple[int, int]]:
        ends = [*self._spans.pop(rid, []), (self._weight_version, tokens)]
        starts = [0, *(end for _, end in ends)]
        return [(version, end - start) for (version, end), start in zip(ends, starts) if end > start]

    @property
    def idle(self) -> bool:
        return not self._touched and not self._scheduler.finished and self._scheduler.is_fully_idle()

    def pause(self) -> None:
        self._paused = True
        self._scheduler.settle()

    def unpause(self) -> None:
        self._paused = False

    # --- weights and memory ----------------------------------------------------------------------------------------

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    def layout(self) -> list[TensorLayout]:
        return [
            TensorLayout(name, self._family.sglang_layout(name, tuple(tensor.shape), self.tp_rank, self.tp_size))
            for name, tensor in self._model.named_parameters()
        ]

    @property
    def _model(self) -> torch.nn.Module:
        return self._scheduler.tp_worker.model_runner.model

    def commit(self, version: int) -> None:
        for req in [*self._scheduler.retract_all(), *self._scheduler.finished]:
            if req.output_ids:
                self._spans[req.rid].append((self._weight_version, len(req.output_ids)))
        self._weight_version = version

    def flush(self) -> None:
        self._require_idle("flush")
        self._scheduler.flush_cache(empty_cache=False)

    def release(self, keep_weights: bool = False) -> None:
        self._require_memory()
        self._require_idle("release")
        kept = [GPU_MEMORY_TYPE_WEIGHTS] if keep_weights else []
        self._released = [tag for tag in GPU_MEMORY_ALL_TYPES if tag not in kept]
        self._scheduler.weight_updater.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=self._released))

    def resume_weights(self) -> None:
        if GPU_MEMORY_TYPE_WEIGHTS in self._released:
            self._take([GPU_MEMORY_TYPE_WEIGHTS])

    def resume(self) -> None:
        if self._released:
            self._take(self._released)

    def _take(self, tags: list[str]) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the trainer has freed, its allocator still holds
            self._require_free(tags)
        self._scheduler.weight_updater.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
        self._released = [tag for tag in self._released if tag not in tags]

    def memory(self) -> EngineMemory:
        sizes = self._sizes()
        here = [sizes[tag] if tag not in self._released else 0 for tag in _PARTS]
        return EngineMemory(*here)

    def _sizes(self) -> dict[str, int]:
        """Bytes by SGLang's name; on a CPU those of freed storages are 0."""
        return {
            GPU_MEMORY_TYPE_WEIGHTS: storage.size(self._model.parameters()),
            GPU_MEMORY_TYPE_KV_CACHE: storage.size(self._scheduler.kv_cache()),
            GPU_MEMORY_TYPE_CUDA_GRAPH: int(self._scheduler.tp_worker.model_runner.graph_mem_usage * 2**30),
        }

    def close(self) -> None:
        del self._scheduler
        world.leave()
        runtime_context.reset_context()
        # of CUDA graphs; another model's would be captured with this one's token ids, which it may not have
        input_buffers._forward_input_buffer_pool.clear()

    def _require_free(self, tags: list[str]) -> None:
        """torch_memory_saver ends the process when the driver has nothing left for it."""
        sizes, (free, total) = self._sizes(), torch.cuda.mem_get_info()
        needed = sum(sizes[tag] for tag in tags)
        if needed > free:
            raise MemoryError(
                f"the engine's {' and '.join(tags)} take {needed / 2**30:.2f} GiB, of which {free / 2**30:.2f} of "
                f"{total / 2**30:.1f} are free"
            )

    def _require_memory(self) -> None:
        if self._released:
            raise RuntimeError("the engine's memory is released: resume() and refit it first")

    def _require_idle(self, what: str) -> None:
        if not self.idle:
            raise RuntimeError(f"{what}() needs an idle engine: step until idle is true, or abort first")


def _finish_reason(req: Req) -> FinishReason:
    reason = req.finished_reason
    if isinstance(reason, FINISH_LENGTH):
        return FinishReason.LENGTH
    if isinstance(reason, FINISH_ABORT):
        if reason.message != FINISH_ABORT().message:
            raise RuntimeError(f"SGLang gave up request {req.rid.removesuffix(_END)}: {reason.message}")
        return FinishReason.ABORT
    return FinishReason.STOP


def _import_no_other_models() -> None:
    """SGLang would import all of its 200 models, which takes seconds, to look one up."""
    from sglang.srt import models

    others = {module.name for module in pkgutil.iter_modules(models.__path__)} - FAMILIES.keys()
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(others))


@contextlib.contextmanager
def _keep_random_state() -> Iterator[None]:
    """SGLang seeds every generator of the process when it is built."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
