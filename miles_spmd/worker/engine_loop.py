"""A worker's part in one rollout: step the engine, take requests from the controller, send back what finishes."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

from miles_spmd.generation.engine import Engine
from miles_spmd.platform.device_memory import first_line, is_out_of_memory
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import AbortRequests, Command, Completions, EndGenerate, Submit
from miles_spmd.types.request import Output
from miles_spmd.worker.stopwatch import Stopwatch


class Lockstep:
    """The ranks of one engine, which must all step or all stop. Only the leader hears the controller, so it tells the
    others before every step. Building it is collective over all ranks of the run."""

    def __init__(self, engine_size: int) -> None:
        first = dist.get_rank() // engine_size * engine_size
        self.leader = dist.get_rank() == first
        self._first = first
        self._group: dist.ProcessGroup | None = None
        if engine_size > 1:
            self._group, _ = dist.new_subgroups(engine_size, backend="gloo")

    def agree(self, go_on: bool) -> bool:
        """The leader's ``go_on``, on every rank of the engine."""
        if self._group is None:
            return go_on
        word = torch.tensor(go_on)
        dist.broadcast(word, self._first, self._group)
        return bool(word)


def run_rollout(
    rank: int,
    engine: Engine,
    dealer: Dealer,
    lockstep: Lockstep,
    watch: Stopwatch,
    progress: Callable[[str], None],
) -> int:
    """From a Generate command until the engine is idle and the controller has said that nothing more will come. Returns
    how often it ran out of memory and began again.

    It begins with an empty prefix cache: what an evaluation has left there would decide which tokens of a prompt are
    computed together, and so their last bits. ``progress`` is told how far it is.
    """
    engine.flush()
    steps, retries, ended = 0, 0, False
    while True:
        with watch("wait"):
            if lockstep.leader:
                ended = _listen(engine, dealer, ended)
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
    """What finished; None when there was too little memory and the engine begins again with fewer requests at a time,
    which ends: it halves them. Raises what the step raised where it cannot."""
    try:
        return engine.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # or they would keep what the step had allocated so far
        limit = engine.retry_smaller()
        if limit is None:
            raise
        print(f"rollout: out of memory; again with at most {limit} requests at a time: {first_line(error)}")
        return None


def _listen(engine: Engine, dealer: Dealer, ended: bool) -> bool:
    """Do what the controller has asked by now; with nothing to run, sleep until it asks. Returns whether it has ended
    the rollout. Raises ValueError when a request does not fit the engine."""
    while (command := dealer.receive(0 if ended or not engine.idle else None)) is not None:
        match command:
            case Command(body=Submit(requests)):
                engine.submit(requests)
            case Command(body=AbortRequests(rids)):
                engine.abort(rids)
            case Command(body=EndGenerate()):
                ended = True
            case _:
                raise RuntimeError(f"{type(command).__name__} in the middle of a rollout")
    return ended
