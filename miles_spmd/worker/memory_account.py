"""The account of a rank's device: who holds how much of it at every hand-off, against what was planned.

A hand-off is a moment at which trainer and engine have just changed what they hold. Activations come and go between
two of them: of those the most is known, and on a CPU, whose allocator keeps no account, only how far the process grew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.generation.engine import EngineMemory
from miles_spmd.models import load_family
from miles_spmd.planning.memory_estimate import estimate_memory
from miles_spmd.planning.parallel_layout import ParallelLayout
from miles_spmd.planning.release import GIB, ORDER, SPARE, Release, choose_release, with_margin
from miles_spmd.planning.remedies import remedies
from miles_spmd.platform import device_memory
from miles_spmd.platform.device_memory import Reading
from miles_spmd.types.phase import Phase

Holders = Mapping[str, int]  # bytes
NOTHING = EngineMemory(0, 0)


class DeviceMemoryError(RuntimeError):
    """Something asked for memory that there is not."""


class MemoryPlanError(RuntimeError):
    """More memory is needed, or is in use, than the plan says or the device has."""


@dataclass
class MemoryAccount:
    """Of one rank; torch.distributed is initialised. ``trains`` and ``generates``: what this rank is there for."""

    config: Config
    world_size: int  # of the run
    trains: bool = True
    generates: bool = True
    phase: Phase = Phase.START
    step: int = 0
    trainer: Callable[[], Holders] = dict  # bytes by what for, without activations
    engine: Callable[[], EngineMemory] = lambda: NOTHING
    working: int = 0  # activations at most, in any phase so far
    _whole_engine: EngineMemory = NOTHING  # as it was built
    _began: Reading = field(default_factory=device_memory.read)
    _peaks: dict[str, float] = field(default_factory=dict)
    _said: str = ""

    def __post_init__(self) -> None:
        family = load_family(self.config.model.hf_checkpoint)
        layout = ParallelLayout.of(self.config, self.world_size)
        self.plan = estimate_memory(self.config, family, layout)
        self._allowance = self.config.train.memory_allowance
        self._exact = device_memory.is_exact()

    # --- before there is anything ------------------------------------------------------------------------------------

    def require_room(self, *, training: bool) -> None:
        """Raise MemoryPlanError, with all there is to know, if the device cannot hold what is planned. ``training``:
        whether this run makes optimizer steps. Activations, which are estimated, may turn out to be fewer."""
        plan, free = self.plan, device_memory.read().free
        print(f"memory, planned: {listed(self._planned())}; {free / GIB:.2f} GiB free")
        working = int(plan.working / (1 + self._allowance)) if training else 0
        train = plan.trainer + working if self.trains else 0
        generate = plan.generating + plan.kv_bytes_per_token if self.generates else 0
        host = plan.host if self.trains else 0
        if not self._exact:
            train, generate = train + host, generate + host
        elif host > (room := device_memory.read_host().free):
            raise MemoryPlanError(
                f"{host / GIB:.2f} GiB of models and optimizer states are to be kept in host memory for this rank, of "
                f"which {room / GIB:.2f} are free: do without train.offload_train, keep_old_actor or a KL term, or "
                "raise megatron.tensor_model_parallel_size"
            )
        for needed, when in ((train, "training"), (generate, "generating")):
            if needed > free:
                raise MemoryPlanError(
                    f"{when} takes at least {needed / GIB:.2f} GiB on this rank, and {free / GIB:.2f} of the "
                    f"{self._began.total / GIB:.1f} GiB of its device are free; planned: {listed(self._planned())}. "
                    f"{remedies(self.config, when)}"
                )

    # --- hand-offs ---------------------------------------------------------------------------------------------------

    def begin(self, phase: Phase, step: int) -> None:
        """A command."""
        self.phase, self.step = phase, step
        self._restart(device_memory.read())

    def built(self, engine: Callable[[], EngineMemory]) -> None:
        self.engine, self._whole_engine = engine, engine()

    def holders(self, now: Reading | None = None) -> dict[str, int]:
        """Everything in use on the device, by holder; "others" are the context, NCCL, and other processes on a GPU."""
        now = now or device_memory.read()
        engine = self.engine()
        named = {
            **self.trainer(),
            "engine weights": engine.weights,
            "KV cache": engine.kv_cache,
            "CUDA graphs": engine.graphs,
        }
        away = sum(self._whole_engine) - sum(engine) if self._exact else 0  # which torch's account still has
        tensors = now.allocated - away - sum(named.values())
        unused = now.reserved - now.allocated
        others = now.used - (now.reserved - away) if self._exact else 0
        return named | {"other tensors": max(0, tensors), "unused by torch": unused, "others": max(0, others)}

    @contextmanager
    def work(self, what: str) -> Iterator[None]:
        """The trainer's, for a while."""
        yield
        self.record(what, worked=True)

    def record(self, handoff: str, *, worked: bool = False) -> None:
        """Write a line into the log. ``worked``: the trainer has, since the last line. Raises MemoryPlanError when
        somebody holds more than was planned for it, and the allowance is used up."""
        now = device_memory.read()
        grown = max(0, now.allocated_peak - self._began.allocated)
        began = self._began  # in between, either torch or the engine's memory saver took something
        used = max(now.used, began.used + now.reserved_peak - began.reserved) if self._exact else now.reserved_peak
        self.note(str(self.phase), used / GIB)
        held = self.holders(now)
        text = f"memory, {self.phase} {self.step}, {handoff}: {listed(held)}; {now.free / GIB:.2f} GiB free"
        if worked:
            text += f"; meanwhile up to {grown / GIB:.2f} for activations"
            self.note("activations", grown / GIB)
            if self._exact:
                self.working = max(self.working, grown)
                if grown > with_margin(self.plan.working, self._allowance):
                    text += f", where {self.plan.working / GIB:.2f} were planned"
        print(text)
        self._restart(now)
        self._check(held)

    def _check(self, measured: Holders) -> None:
        over = [
            f"{name} {measured[name] / GIB:.2f} GiB instead of {size / GIB:.2f}"
            for name, size in self._planned().items()
            if measured.get(name, 0) > with_margin(size, self._allowance)
        ]
        if over:
            raise MemoryPlanError(
                f"more memory in use than planned: {', '.join(over)}. That is beyond train.memory_allowance "
                f"({self._allowance:g}) and {SPARE / GIB:g} GiB; a larger one lets the run go on"
            )

    def _planned(self) -> dict[str, int]:
        plan = self.plan
        return {
            "parameters": plan.parameters,
            "gradients": plan.gradients,
            "optimizer": plan.optimizer,
            "critic": plan.critic,
            "activations": plan.working,
            "engine weights": plan.engine_weights,
        }

    def _restart(self, now: Reading) -> None:
        device_memory.reset_peak()
        self._began = now

    def note(self, name: str, value: float) -> None:
        """The metric ``memory/name`` of this command, unless it was larger before."""
        self._peaks[f"memory/{name}"] = max(self._peaks.get(f"memory/{name}", 0.0), value)

    def take(self) -> dict[str, float]:
        """The metrics since the last call."""
        taken, self._peaks = self._peaks, {}
        return taken

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Errors for want of memory become DeviceMemoryError: who holds how much, and what to change."""
        try:
            yield
        except Exception as error:
            if not device_memory.is_out_of_memory(error):
                raise
            now = device_memory.read()
            where = f"GPU {torch.cuda.current_device()}" if torch.cuda.is_available() else "the host"
            raise DeviceMemoryError(
                f"no memory left on {where}: {device_memory.first_line(error)}. Of {now.total / GIB:.1f} GiB "
                f"{now.free / GIB:.2f} are free; held: {listed(self.holders(now))}. {remedies(self.config, self.phase)}"
            ) from error

    # --- what the engine gives up ------------------------------------------------------------------------------------

    def release(self, moves_in: int) -> Release:
        """What the engine, which has all of its memory now, has to give up for a trainer that takes ``moves_in`` bytes
        and its activations. Collective over ranks with an engine: all do the same."""
        now, engine = device_memory.read(), self.engine()
        needed = moves_in + with_margin(max(self.plan.working, self.working), self._allowance)
        room = now.free + (max(0, now.reserved - now.allocated - engine.graphs) if self._exact else 0)
        choice = agreed(choose_release(self.config, needed, room, engine.kv_cache + engine.graphs))
        if choice != self._said:
            print(
                f"memory: the engine gives up {choice.replace('_', ' ')} while the trainer works, which is to have "
                f"{needed / GIB:.2f} GiB; free beside the engine are {room / GIB:.2f}"
            )
            self._said = choice
        return choice


def agreed(choice: Release) -> Release:
    """The most that any rank needs."""
    number = torch.tensor(ORDER.index(choice))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return ORDER[int(number)]


def listed(sizes: Holders) -> str:
    """In GiB, the largest first, without those that are nothing."""
    parts = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size >= GIB // 200) or "nothing"
