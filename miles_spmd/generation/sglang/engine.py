"""The rollout engine: SGLang in this process, in the torch.distributed world of the run."""

from __future__ import annotations

import contextlib
import logging
import math
import random
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
from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.model_executor import input_buffers
from sglang.srt.server_args import set_global_server_args_for_scheduler

from miles_spmd.generation.engine import EngineMemory
from miles_spmd.generation.sglang import (
    cpu_attention,
    gpu_kernels,
    model_blocks,
    process_groups,
    sampler,
    split_attention_backend,
)
from miles_spmd.generation.sglang.invariant_layers import invariant_layers
from miles_spmd.generation.sglang.requests import END
from miles_spmd.generation.sglang.rotary import own_tables
from miles_spmd.generation.sglang.scheduler import InProcessScheduler
from miles_spmd.generation.sglang.server_args import build_server_args
from miles_spmd.models import TensorLayout, load_family
from miles_spmd.platform import cuda
from miles_spmd.platform.cpu import sglang_shim
from miles_spmd.types.request import Output, Request, check_request
from miles_spmd.types.trajectory import FinishReason

sglang_shim.check_version()


class SglangEngine:
    """One rank of an :class:`~miles_spmd.generation.engine.Engine` of ``tp_size`` consecutive ranks of the world.

    All ranks of the world construct theirs at the same time. A process holds one at a time; after ``close`` it can
    construct another. Weights are random until the first refit.

    ``idle`` needs no collective: it is derived from SGLang's queues and batches, which are equal on all ranks because
    they follow from the leader's broadcast messages and from sampled tokens, and every rank samples the same tokens
    from the same gathered logits. Messages that are not broadcast yet count through ``_touched``, which every rank sets
    in ``submit`` and ``abort``, whatever the arguments.
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
        ``context_length``: the longest prompt plus response, by default the model's. ``cache_tokens``: upper bound of
        the KV cache; ``server_args`` and the free memory may make it smaller. ``invariant``: compute with
        :mod:`miles_spmd.invariant`, so that responses do not depend on the batch; sums over tensor-parallel ranks then
        have ``sum_terms`` partial sums, at least one per rank.

        Raises ValueError for settings that SGLang does not have or that this engine sets itself.
        """
        self._family = load_family(model_path)
        self.context_length = context_length or self._family.max_sequence_length
        table = server_args or {}
        logging.getLogger("sglang").setLevel(table.get("log_level", "error").upper())
        args = build_server_args(str(model_path), dtype, self.context_length, table, cache_tokens, invariant)
        self.server_args = args
        self.size = args.tp_size
        self._tp_rank = dist.get_rank() % args.tp_size
        self.leader = self._tp_rank == 0
        sampler.register()
        if args.device == "cpu":
            cpu_attention.register()
            sglang_shim.adapt()
        else:
            cuda.require_memory_saver()
            gpu_kernels.use_one_expert_sum()
            split_attention_backend.register(invariant)
        model_blocks.register(self._family)
        layers = invariant_layers(invariant or args.device == "cpu", self._family, sum_terms)
        float32_on_gpu = args.device == "cuda" and dtype == "float32"
        kernels = gpu_kernels.float32_kernels() if float32_on_gpu else contextlib.nullcontext()
        positions = own_tables(self._family, self.context_length)
        with _keep_random_state(), layers, positions, kernels:
            set_global_server_args_for_scheduler(args)
            process_groups.join(args.tp_size)
            device_index = torch.cuda.current_device() if args.device == "cuda" else 0
            self._scheduler = InProcessScheduler(args, device_index, self._tp_rank)
        self.weight_version = -1
        self._paused = False
        self._touched = False  # submit or abort was called since the last step
        self._released: list[str] = []  # tags of the memory that is released
        self._live: dict[str, Request] = {}  # leader only: requests that were submitted and not returned
        self._aborted: set[str] = set()  # leader only: rids of live requests that an abort was sent for
        # rid -> (version, tokens that the request had when this version ended), for earlier weight versions
        self._spans: dict[str, list[tuple[int, int]]] = defaultdict(list)

    # --- requests --------------------------------------------------------------------------------------------------

    @property
    def cache_tokens(self) -> int | None:
        return None if self.server_args.disable_radix_cache else self._scheduler.max_total_num_tokens

    @property
    def longest_request(self) -> int:
        """Tokens of prompt and response that always fit, whatever their division; see :meth:`_check`."""
        return min(self.context_length, self._scheduler.max_total_num_tokens - 2 * self._scheduler.page_size)

    def submit(self, requests: list[Request]) -> None:
        if self.leader:
            for request in requests:
                self._check(request)
            rids = [request.rid for request in requests]
            for rid in rids:
                if rid in self._live or rids.count(rid) > 1:
                    raise ValueError(f"request {rid}: another request with this rid is in the engine")
            self._live |= {request.rid: request for request in requests}
            self._scheduler.inbox += requests
        self._touched = True

    def _check(self, request: Request) -> None:
        check_request(request, self.context_length)
        if request.sampling.stop and self._scheduler.tokenizer is None:
            raise ValueError(f"request {request.rid}: stop strings need a tokenizer in the checkpoint folder")
        prompt, new = len(request.input_ids), request.sampling.max_new_tokens
        page, cache = self._scheduler.page_size, self._scheduler.max_total_num_tokens
        if -(-prompt // page) * page + new + page >= cache:  # SGLang would queue it and never start it
            raise ValueError(
                f"request {request.rid}: {prompt} prompt + {new} new tokens do not fit SGLang's cache of {cache} "
                "tokens; raise sglang.max_total_tokens or mem_fraction_static"
            )

    def abort(self, rids: list[str] | None = None) -> None:
        if self.leader:
            stopped = [rid for rid in (self._live if rids is None else rids) if rid in self._live]
            self._aborted.update(stopped)
            self._scheduler.inbox += stopped
        self._touched = True

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
        # Other ranks of the engine may be waiting in a collective of the step that failed here.
        if self.size > 1 or (limit := self._scheduler.halve()) is None:
            return None
        self._scheduler.forget()
        finished = {req.rid.removesuffix(END) for req in self._scheduler.finished}
        unfinished = [request for rid, request in self._live.items() if rid not in finished]
        for request in unfinished:
            self._spans.pop(request.rid + END, None)
        # The inbox may hold messages that were not broadcast yet; ``_live`` and ``_aborted`` contain these, too.
        self._scheduler.inbox[:] = [*unfinished, *sorted(self._aborted)]
        self._touched = True
        return limit

    def _output(self, req: Req) -> Output:
        rid = req.rid.removesuffix(END)
        ids = list(req.output_ids_through_stop)
        log_probs = req.logprob.output_token_logprobs_val[: len(ids)]
        prompt, top1 = req.logprob.input_token_logprobs_val, req.logprob.output_top_logprobs_idx
        if not all(map(math.isfinite, log_probs)):
            raise FloatingPointError(
                f"request {rid}: the model of weight version {self.weight_version} computes log-probs that are not "
                "finite; check the checkpoint, or the last optimizer step"
            )
        return Output(
            rid=rid,
            output_ids=ids,
            output_log_probs=log_probs,
            finish_reason=_finish_reason(req),
            weight_versions=self._weight_versions(req.rid, len(ids)),
            prompt_log_probs=prompt[1:] if prompt else None,  # the first token has none
            top1_ids=[token for (token,) in top1[: len(ids)]] if top1 else None,
            cached_tokens=req.cached_tokens,
        )

    def _weight_versions(self, rid: str, tokens: int) -> list[tuple[int, int]]:
        """Return (version, number of tokens) in order for a request that ends with ``tokens`` tokens."""
        ends = [*self._spans.pop(rid, []), (self.weight_version, tokens)]
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
        """Raises ValueError where SGLang's model is another one than the family's blocks describe."""
        layouts = [
            TensorLayout(name, self._family.sglang_layout(name, tuple(tensor.shape), self._tp_rank, self.size))
            for name, tensor in self._model.named_parameters()
        ]
        if self.leader:  # another rank may have only padding of a matrix
            model_blocks.require_all_tensors(layouts, self._family)
        return layouts

    @property
    def _model(self) -> torch.nn.Module:
        return self._scheduler.tp_worker.model_runner.model

    def commit(self, version: int) -> None:
        # A request that has finished and is not returned yet got its tokens from the old weights, too.
        for req in [*self._scheduler.retract_all(), *self._scheduler.finished]:
            if req.output_ids:
                self._spans[req.rid].append((self.weight_version, len(req.output_ids)))
        self.weight_version = version

    def flush(self) -> None:
        self._require_idle("flush")
        self._scheduler.flush_cache(empty_cache=False)

    def release(self, keep_weights: bool = False) -> None:
        self._require_memory()
        self._require_idle("release")
        self._released = [tag for tag in GPU_MEMORY_ALL_TYPES if not (keep_weights and tag == GPU_MEMORY_TYPE_WEIGHTS)]
        self._scheduler.weight_updater.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=self._released))

    def resume_weights(self) -> None:
        if GPU_MEMORY_TYPE_WEIGHTS in self._released:
            self._resume([GPU_MEMORY_TYPE_WEIGHTS])

    def resume(self) -> None:
        if self._released:
            self._resume(self._released)

    def _resume(self, tags: list[str]) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # torch's allocator still holds the memory that the trainer has freed
            self._require_free(tags)
        self._scheduler.weight_updater.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
        self._released = [tag for tag in self._released if tag not in tags]

    def memory(self) -> EngineMemory:
        return EngineMemory(*(0 if tag in self._released else size for tag, size in self._sizes().items()))

    def _sizes(self) -> dict[str, int]:
        """Return bytes by SGLang's tag, in the order of EngineMemory's fields, whether released or not; on a CPU the
        size of a freed storage is 0."""
        return {
            GPU_MEMORY_TYPE_WEIGHTS: _storage_bytes(self._model.parameters()),
            GPU_MEMORY_TYPE_KV_CACHE: _storage_bytes(self._scheduler.kv_cache()),
            GPU_MEMORY_TYPE_CUDA_GRAPH: int(self._scheduler.tp_worker.model_runner.graph_mem_usage * 2**30),
        }

    def close(self) -> None:
        del self._scheduler
        process_groups.leave()
        runtime_context.reset_context()
        # Input buffers of CUDA graphs. Graphs of the next engine would be captured with the token ids that they hold,
        # which its vocabulary may not have.
        input_buffers._forward_input_buffer_pool.clear()

    def _require_free(self, tags: list[str]) -> None:
        """Raise MemoryError when ``tags`` do not fit: torch_memory_saver would end the process."""
        sizes, (free, total) = self._sizes(), torch.cuda.mem_get_info()
        needed = sum(sizes[tag] for tag in tags)
        if needed > free:
            raise MemoryError(
                f"the engine's {' and '.join(tags)} need {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} of "
                f"{total / 2**30:.1f} GiB are free"
            )

    def _require_memory(self) -> None:
        if self._released:
            raise RuntimeError("the engine's memory is released: resume() and refit it first")

    def _require_idle(self, what: str) -> None:
        if not self.idle:
            raise RuntimeError(f"{what}() requires an idle engine: step until idle is true, or abort first")


def _finish_reason(req: Req) -> FinishReason:
    reason = req.finished_reason
    if isinstance(reason, FINISH_LENGTH):
        return FinishReason.LENGTH
    if isinstance(reason, FINISH_ABORT):
        if reason.message != FINISH_ABORT().message:
            raise RuntimeError(f"SGLang aborted request {req.rid.removesuffix(END)}: {reason.message}")
        return FinishReason.ABORT
    return FinishReason.STOP


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@contextlib.contextmanager
def _keep_random_state() -> Iterator[None]:
    """Restore the state of all random generators at the end: SGLang seeds them when it is constructed."""
    python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices, device_type="cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
