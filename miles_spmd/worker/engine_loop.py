"""A worker's part in one rollout: step the engine, receive requests from the controller, send what finishes."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

from miles_spmd.generation.engine import Engine
from miles_spmd.platform.device_memory import first_line, is_out_of_memory
from miles_spmd.protocol.commands import AbortRequests, EndGenerate, Submit
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Call, Completions
from miles_spmd.types.request import Output
from miles_spmd.worker.stopwatch import Stopwatch


class Lockstep:
    """The ranks of one engine, which must all step or all stop, because a step has collectives. Only the leader
    receives from the controller, so it broadcasts the decision before every step. Building it is collective over all
    ranks with an engine."""

    def __init__(self, engine_size: int) -> None:
        self.leader = dist.get_rank() % engine_size == 0
        self._group: dist.ProcessGroup | None = None
        if engine_size > 1:
            self._group, _ = dist.new_subgroups(engine_size, backend="gloo")

    def agree(self, go_on: bool) -> bool:
        """Return the leader's ``go_on`` on every rank of the engine."""
        if self._group is None:
            return go_on
        decision = torch.tensor(go_on)
        dist.broadcast(decision, group=self._group, group_src=0)
        return bool(decision)


def run_rollout(
    rank: int,
    engine: Engine,
    dealer: Dealer,
    lockstep: Lockstep,
    watch: Stopwatch,
    progress: Callable[[str], None],
) -> int:
    """Step the engine from a Generate command until it is idle and the controller has sent EndGenerate. Returns how
    often the engine ran out of memory and began again. ``progress`` receives the number of steps, as text.

    The prefix cache is emptied first: entries of an evaluation would change which tokens of a prompt are prefilled
    together, and with that the rounding of their log-probs.
    """
    engine.flush()
    steps, retries, ended = 0, 0, False
    while True:
        with watch("wait"):
            if lockstep.leader:
                ended = _receive(engine, dealer, ended)
            go_on = lockstep.agree(not (ended and engine.idle))
        if not go_on:
            return retries
        with watch("engine"):
            outputs = step(engine)
        if outputs is None:
            retries += 1
        if outputs and lockstep.leader:
            dealer.send(Completions(rank, outputs))
        steps += 1
        progress(f"engine step {steps}")


def step(engine: Engine) -> list[Output] | None:
    """Return what finished, or None when memory did not suffice and the engine begins again with half as many requests
    at a time. Raises what the step raised, where the engine cannot run fewer."""
    try:
        return engine.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that the step had allocated so far
        limit = engine.retry_smaller()
        if limit is None:
            raise
        print(f"rollout: out of memory; again with at most {limit} requests at a time: {first_line(error)}")
        return None


def _receive(engine: Engine, dealer: Dealer, ended: bool) -> bool:
    """Execute what the controller has sent by now; an idle engine waits for it. Returns whether the controller has
    closed the rollout. Raises ValueError when a request does not fit the engine."""
    while (call := dealer.receive(0 if ended or not engine.idle else None)) is not None:
        match call:
            case Call(command=Submit(requests)):
                engine.submit(requests)
            case Call(command=AbortRequests(rids)):
                engine.abort(rids)
            case Call(command=EndGenerate()):
                ended = True
            case _:
                raise RuntimeError(f"{type(call).__name__} in the middle of a rollout")
    return ended
