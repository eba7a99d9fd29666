"""SGLang's scheduler without its server: requests and results are objects in this process.

SGLang's own process calls ``event_loop_*``, which never return; here the host calls :meth:`InProcessScheduler.step`,
one iteration of the loop. The parts that SGLang builds around sockets are replaced by ones that use lists.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from typing import Any

import torch
from sglang.srt.managers import scheduler
from sglang.srt.managers.io_struct import AbortReq, PauseGenerationReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from miles_spmd.generation.sglang.cpu_memory_saver import CpuMemorySaver
from miles_spmd.generation.sglang.requests import END, Item, broadcast, message
from miles_spmd.generation.sglang.shared_prefills import SharedPrefills
from miles_spmd.types.request import Request


class InProcessScheduler(scheduler.Scheduler):
    """Reads requests from ``inbox`` and appends those that ended to ``finished``, on every rank. Only the inbox of the
    engine's first rank counts; its content is broadcast to the others."""

    # attributes of SGLang's class that are assigned here, whose types mypy does not see
    running_batch: Any
    last_batch: Any
    cur_batch_for_debug: Any
    chunked_req: Any
    chunked_prefill_size: Any
    waiting_queue: list[Req]

    def __init__(self, server_args: ServerArgs, device_index: int, tp_rank: int) -> None:
        self.inbox: list[Item] = []
        self.finished: list[Req] = []
        self._limit: int | None = None  # of running requests, after a batch ran out of memory
        self._received: dict[str, Request] = {}  # by SGLang's rid: those that are taken from the inbox now
        no_ports = PortArgs(**dict.fromkeys((field.name for field in dataclasses.fields(PortArgs)), ""))
        moe_ep_rank = tp_rank * server_args.ep_size // server_args.tp_size
        super().__init__(server_args, no_ports, device_index, tp_rank, moe_ep_rank, 0, 0, 0, None)
        self.max_req_input_len = self.model_config.context_len
        self._held: set[str] = set()  # rids of requests that are kept out of the batch that is planned now
        self._shared = SharedPrefills(self.tree_cache, self.page_size, int(self.enable_overlap))
        if not server_args.disable_radix_cache:
            self._prioritise, self.policy.calc_priority = self.policy.calc_priority, self._hold_back
        self.result_queue: deque[Any] = deque()  # (batch, result) of the batch that still runs, where batches overlap
        if self.enable_overlap:  # SGLang sets these up when it enters its event loop
            self.schedule_stream = torch.cuda.Stream()
            # torch returns the streams of a fixed pool in turn; on the same stream the two would not overlap
            while self.schedule_stream == self.forward_stream:
                self.schedule_stream = torch.cuda.Stream()
            self._war_barrier_enabled = True

    @torch.inference_mode()
    def step(self) -> None:
        """Run one iteration of SGLang's event loop; with overlapping batches it returns while its batch still runs."""
        if self.enable_overlap:
            # the host's stream may just have written weights that this batch reads
            self.schedule_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.schedule_stream):
                self._step_overlapped()
            return
        batch = self._next_batch()
        if batch:
            self.process_batch_result(batch, self.run_batch(batch))
        else:
            self.on_idle()
        self.last_batch = batch

    def _next_batch(self) -> Any:
        """Take requests from the inbox and return the next batch to run, or None."""
        received = self.request_receiver.recv_requests()
        self._received = {item.rid + END: item for item in received if isinstance(item, Request)}
        self.process_input_requests([message(item, self.tokenizer) for item in received])
        # SGLang's own priorities preempt what runs. Its policies other than first come, first served sort once more.
        self.waiting_queue.sort(key=lambda req: req.order)
        self._shared.step()
        waiting, self._held = [*self.waiting_queue], set()
        plan = self.get_next_batch_to_run(running_batch=self.running_batch, last_batch=self.last_batch)
        if self._held:  # they go back to their places
            left, before = {req.rid for req in self.waiting_queue}, {req.rid for req in waiting}
            retracted = [req for req in self.waiting_queue if req.rid not in before]
            self.waiting_queue = [req for req in waiting if req.rid in left or req.rid in self._held] + retracted
        self.running_batch = plan.running_batch
        self.cur_batch_for_debug = plan.batch_to_run
        return plan.batch_to_run

    def _hold_back(self, waiting: list[Req], running: ScheduleBatch | None = None) -> None:
        """Bring the queue into SGLang's order, and take those out of it that are better prefilled later."""
        self._prioritise(waiting, running)
        self._held = self._shared.held(waiting, self.chunked_req)
        waiting[:] = [req for req in waiting if req.rid not in self._held]

    def _step_overlapped(self) -> None:
        """Launch a batch, then process the result of the batch before it while the new one runs on the GPU.

        This is the body of SGLang's ``event_loop_overlap``. A batch is therefore planned before the last one's tokens
        are known on the host, and a request that has just ended takes part in one more batch, whose token is dropped.
        """
        batch = self._next_batch()
        process_first = self.is_disable_overlap_for_batch(batch, last_batch=self.last_batch)
        if process_first:
            self._process_last()
        result = self.run_batch(batch) if batch else None
        if batch:
            self._apply_war_barrier()  # the next batch overwrites buffers that this one's forward pass may still read
            self.result_queue.append((batch.copy(), result))  # a copy: planning the next batch changes this one
        if self.last_batch and not process_first:
            self._process_last()
        elif not self.last_batch and batch is None:
            self.on_idle()
        # sampling that had to wait until the last batch was processed (grammars); it does nothing otherwise
        self.launch_batch_sample_if_needed(result, batch)
        self.last_batch = batch

    def _process_last(self) -> None:
        self.process_batch_result(*self.result_queue.popleft())

    def settle(self) -> None:
        """Make later work on the host's current stream wait for the batch that still runs."""
        if self.enable_overlap:
            torch.cuda.current_stream().wait_stream(self.forward_stream)

    @torch.inference_mode()
    def retract_all(self) -> list[Req]:
        """Move all requests in flight back to the queue with their tokens, drop all keys and values, and return the
        queue. Prompt and tokens of these requests are prefilled again, with the weights of then."""
        # SGLang's own way to this state; it also processes the result of a batch that still runs.
        self.pause_generation(PauseGenerationReqInput(mode="retract"))
        self._engine_paused = False
        self._forget_cache()  # SGLang keeps the prefix cache here; its keys belong to the old weights
        return self.waiting_queue

    def _forget_cache(self) -> None:
        self.tree_cache.reset()
        self.req_to_token_pool.clear()
        self.token_to_kv_pool_allocator.clear()

    def get_num_allocatable_reqs(self, running_bs: int) -> int:
        allocatable = super().get_num_allocatable_reqs(running_bs)
        return allocatable if self._limit is None else min(allocatable, self._limit - running_bs)

    def halve(self) -> int | None:
        """Limit the number of running requests to half of those in flight now, and chunks of prefills to half their
        size. Returns the new limit, or None with nothing changed when fewer than two are in flight."""
        # A batch that failed half-way may be in any of these, and a request in several of them.
        batches = [self.running_batch, self.last_batch, self.cur_batch_for_debug, *(b for b, _ in self.result_queue)]
        running = len({req.rid for batch in batches if batch is not None for req in batch.reqs})
        limit = min(running, self._limit or running) // 2
        if not limit:
            return None
        self._limit = limit
        if self.chunked_prefill_size:
            self.chunked_prefill_size = max(self.chunked_prefill_size // 2, self.page_size)
        return limit

    @torch.inference_mode()
    def forget(self) -> None:
        """Drop all requests in flight or queued: after a step that failed half-way their state is undefined."""
        if self.device != "cpu":
            torch.cuda.synchronize()  # an earlier batch may still run and write into the cache
        self.result_queue.clear()
        self.waiting_queue.clear()
        self.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
        self.last_batch = self.cur_batch_for_debug = self.chunked_req = None
        self._forget_cache()
        self.new_token_ratio_tracker.reset()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def kv_cache(self) -> list[torch.Tensor]:
        """Return the buffers of keys and values of all layers."""
        pool = self.tp_worker.model_runner.token_to_kv_pool
        return [buffer for layer in range(pool.layer_num) for buffer in pool.get_kv_buffer(layer)]

    # --- overridden steps of SGLang's constructor ------------------------------------------------------------------

    def init_ipc_channels(self, port_args: PortArgs) -> None:
        self.ipc_channels = SchedulerIpcChannels(
            recv_from_tokenizer=self.inbox,
            recv_from_rpc=None,
            send_to_tokenizer=_AbortCollector(self.finished),
            send_to_detokenizer=self.finished,
            send_metrics_from_scheduler=None,
        )
        self.load_snapshot_writer = None

    def init_watch_dog_memory_saver_input_blocker(self) -> None:
        # Without a watchdog: SGLang's kills the parent process, which here is the launcher of all ranks.
        runner = self.tp_worker.model_runner
        if self.device == "cpu":
            self.memory_saver_adapter = CpuMemorySaver(runner.model.parameters(), self.kv_cache())
        else:
            self.memory_saver_adapter = TorchMemorySaverAdapter.create(enable=True)
        self.recv_skipper = None
        self.input_blocker = None

    def init_req_max_new_tokens(self, req: Req) -> None:
        """Give a new request its order and the tokens that it has begun with, as if it had been retracted after them.
        SGLang would shorten responses here that do not fit, and the engine refuses such requests."""
        request = self._received.pop(req.rid)
        req.order, begun = request.order, request.begun
        if begun is None:
            return
        req.output_ids = array("q", begun.output_ids)
        req.logprob.output_token_logprobs_val = list(begun.output_log_probs)
        req.logprob.output_token_logprobs_idx = list(begun.output_ids)
        if begun.top1_ids is not None:
            req.logprob.output_top_logprobs_idx = [[token] for token in begun.top1_ids]
            req.logprob.output_top_logprobs_val = [[0.0] for _ in begun.top1_ids]  # nobody reads them
        # the prompt's are computed, as far as SGLang is concerned
        req.logprob.input_token_logprobs_val = req.logprob.input_token_logprobs_idx = []
        req.logprob.input_top_logprobs_val = req.logprob.input_top_logprobs_idx = []
        req.is_retracted = req.retracted_stain = True


class _InboxReceiver(SchedulerRequestReceiver):
    """Receives from a list where SGLang polls a socket."""

    def recv_requests(self) -> list[Item]:
        received = self.recv_from_tokenizer.copy()
        self.recv_from_tokenizer.clear()
        return broadcast(received, self.tp_group)


class _FinishedCollector(SchedulerOutputStreamer):
    """Collects finished requests only; SGLang would also stream the tokens of running requests, every 50 steps."""

    def stream_output(self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None) -> None:
        for req in reqs:
            if req.finished() and not req.finished_output and req is not skip_req:
                _look_for_an_end(req)
                req.finished_output = True
                self.send_to_detokenizer.append(req)


def _look_for_an_end(req: Req) -> None:
    """Find the end of an aborted request, if its newest token is one: SGLang looks for an abort first, and a response
    that is complete must not be continued."""
    if isinstance(abort := req.finished_reason, FINISH_ABORT) and req.output_ids:
        req.finished_reason = None
        req.update_finish_state()
        req.finished_reason = req.finished_reason or abort


class _AbortCollector:
    """Receives SGLang's messages to its front end and collects requests that were aborted while queued; the other
    messages have no use here. Requests aborted while running come through :class:`_FinishedCollector`."""

    def __init__(self, finished: list[Req]) -> None:
        self._finished = finished

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        if isinstance(output, AbortReq) and isinstance(recv_obj, Req) and not recv_obj.finished_output:
            recv_obj.finished_reason = recv_obj.finished_reason or FINISH_ABORT()
            recv_obj.finished_output = True
            self._finished.append(recv_obj)


# SGLang's constructor builds these in the places of its own.
scheduler.SchedulerRequestReceiver = _InboxReceiver
scheduler.SchedulerOutputStreamer = _FinishedCollector
