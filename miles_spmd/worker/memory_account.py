"""The account of a rank's device: who holds how much of it at every hand-off, compared with what was planned.

A hand-off is a moment at which trainer and engine have just changed what they hold. Activations come and go between two
hand-offs: of them the peak is measured; on a CPU, whose allocator keeps no account, only how far the process grew.

Plans are estimates. Where one was too low the account warns and uses the measured peak from then on; only an allocation
that fails ends the run, with an explanation.
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
from miles_spmd.planning.memory_estimate import estimate_judge, estimate_memory
from miles_spmd.planning.parallel_layout import ParallelLayout
from miles_spmd.planning.release import GIB, ORDER, SPARE, Release, choose_release, remedies, with_margin
from miles_spmd.platform import device_memory
from miles_spmd.platform.device_memory import Reading
from miles_spmd.types.engine_group import JUDGE, POLICY
from miles_spmd.types.phase import Phase

Holders = Mapping[str, int]  # bytes
NOTHING = EngineMemory(0, 0)
ACTIVATIONS = "activations"


class DeviceMemoryError(RuntimeError):
    """An allocation failed. The text lists all holders of memory and what to change."""


class MemoryPlanError(RuntimeError):
    """The weights, gradients and optimizer states alone exceed the memory that there is."""


@dataclass
class MemoryAccount:
    """The account of one rank; torch.distributed is initialised. ``trains`` and ``generates``: the rank's duties.
    ``warn`` receives the text of each warning."""

    config: Config
    world_size: int  # of the run
    trains: bool = True
    generates: bool = True
    warn: Callable[[str], None] = print
    group: str = POLICY  # the engine group that the rank holds a part of, or trains
    phase: Phase = Phase.START
    step: int = 0
    trainer: Callable[[], Holders] = dict  # returns bytes by purpose, without activations
    engine: Callable[[], EngineMemory] = lambda: NOTHING
    measured: dict[str, int] = field(default_factory=dict)  # the peak of each planned holder so far, in any phase
    _whole_engine: EngineMemory = NOTHING  # as it was built
    _began: Reading = field(default_factory=device_memory.read)
    _peaks: dict[str, float] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)
    _reported: str = ""  # the release that the log has last

    def __post_init__(self) -> None:
        if self.group == JUDGE:
            self.plan = estimate_judge(self.config)
        else:
            family = load_family(self.config.model.hf_checkpoint)
            self.plan = estimate_memory(self.config, family, ParallelLayout.of(self.config, self.world_size))
        plan = self.plan
        self._planned = {name: getattr(plan, name) for name in ("parameters", "gradients", "optimizer", "critic")}
        self._planned |= {ACTIVATIONS: plan.working, "engine weights": plan.engine_weights}
        self._allowance = self.config.train.memory_allowance
        self._exact = torch.cuda.is_available()  # torch counts every allocated byte

    # --- before anything is built ------------------------------------------------------------------------------------

    def require_room(self, *, training: bool) -> None:
        """Compare the plan with the device. ``training``: whether this run makes optimizer steps.

        Raise MemoryPlanError, with all facts, where what is certain (weights, gradients, optimizer states) exceeds the
        memory of the device or of the host. Warn where what is estimated, too, exceeds what is free: activations may
        turn out smaller, and another process may end.
        """
        plan, device, host = self.plan, device_memory.read(), device_memory.read_host()
        print(f"memory, planned: {listed(self._planned)}; {device.free / GIB:.2f} GiB free")
        on_host = plan.host if self.trains else 0
        beside = 0 if self._exact else on_host  # without a GPU the host is the device
        # the least that activations may need, where the estimate is too high by the whole allowance
        working = int(plan.working / (1 + self._allowance)) if training else 0
        duties = [("training", plan.trainer + beside, working)] if self.trains else []
        duties += [("generating", plan.generating + beside, plan.kv_bytes_per_token)] if self.generates else []
        for when, states, least in duties:
            if states + least > device.free:
                text = (
                    f"{when} takes at least {(states + least) / GIB:.2f} GiB on this rank, and {device.free / GIB:.2f} "
                    f"of the {device.total / GIB:.1f} GiB of its device are free; {states / GIB:.2f} GiB are for "
                    f"weights, gradients and optimizer states; planned: {listed(self._planned)}. "
                    f"{remedies(self.config, when, self.group)}"
                )
                self._refuse_or_warn(text, certain=states > device.total)
        if self._exact and on_host > host.free:
            text = (
                f"{on_host / GIB:.2f} GiB of models, optimizer states, what checkpoints save and what cells exchange "
                f"are to be kept in host memory for this rank, whose share is {host.total / GIB:.2f} with "
                f"{host.free / GIB:.2f} free: do without train.offload_train, keep_old_actor, a KL term, "
                "checkpoint.save_interval or resilience.cells, or raise megatron.tensor_model_parallel_size"
            )
            self._refuse_or_warn(text, certain=on_host > host.total)

    def _refuse_or_warn(self, text: str, *, certain: bool) -> None:
        if certain:
            raise MemoryPlanError(text)
        self.warn(text)

    # --- hand-offs ---------------------------------------------------------------------------------------------------

    def begin(self, phase: Phase, step: int) -> None:
        """Start the account of a command."""
        self.phase, self.step = phase, step
        self._restart(device_memory.read())

    def built(self, engine: Callable[[], EngineMemory]) -> None:
        """Register the engine, which is resident, by the function that returns what it holds."""
        self.engine, self._whole_engine = engine, engine()

    def holders(self, now: Reading | None = None) -> dict[str, int]:
        """Return the bytes in use on the device, by holder; "others" are the CUDA context, NCCL and other processes."""
        now = now or device_memory.read()
        engine = self.engine()
        named = dict(self.trainer())
        named |= {"engine weights": engine.weights, "KV cache": engine.kv_cache, "CUDA graphs": engine.graphs}
        # torch counts what torch_memory_saver has unmapped as allocated all the same
        away = sum(self._whole_engine) - sum(engine) if self._exact else 0
        tensors = now.allocated - away - sum(named.values())
        unused = now.reserved - now.allocated
        others = now.used - (now.reserved - away) if self._exact else 0
        return named | {"other tensors": max(0, tensors), "unused by torch": unused, "others": max(0, others)}

    @contextmanager
    def work(self, what: str) -> Iterator[None]:
        """Account for the trainer's work in the block. After an error nothing is recorded: the device may not respond
        any more, and :meth:`explaining` describes what was held when memory was the cause."""
        yield
        self.record(what, worked=True)

    def record(self, handoff: str, *, worked: bool = False) -> None:
        """Write a line into the log, and warn where a holder has more than was planned for it and the allowance on top.
        ``worked``: the trainer has, since the last line."""
        now = device_memory.read()
        grown = max(0, now.allocated_peak - self._began.allocated)
        began = self._began  # between the readings only one of torch and the engine's memory saver allocated memory
        used = max(now.used, began.used + now.reserved_peak - began.reserved) if self._exact else now.reserved_peak
        self.note(str(self.phase), used / GIB)
        held = self.holders(now)
        text = f"memory, {self.phase} {self.step}, {handoff}: {listed(held)}; {now.free / GIB:.2f} GiB free"
        if worked:
            text += f"; meanwhile up to {grown / GIB:.2f} for activations"
            self.note("activations", grown / GIB)
        print(text)
        self._restart(now)
        if worked and self._exact:
            held[ACTIVATIONS] = grown
        for name, planned in self._planned.items():
            size = self.measured[name] = max(held.get(name, 0), self.measured.get(name, 0))
            if size > with_margin(planned, self._allowance) and name not in self._warned:
                self._warned.add(name)
                self.warn(
                    f"more memory in use than planned: {name} {size / GIB:.2f} GiB instead of {planned / GIB:.2f}, "
                    f"beyond train.memory_allowance ({self._allowance:g}) and {SPARE / GIB:g} GiB; the run goes on "
                    f"with the measured size. {remedies(self.config, self.phase, self.group)}"
                )

    def _restart(self, now: Reading) -> None:
        device_memory.reset_peak()
        self._began = now

    def note(self, name: str, value: float) -> None:
        """Record the metric ``memory/name`` of this command, of a judge ``memory/judge_name``, unless it was larger
        before."""
        name = f"judge_{name}" if self.group == JUDGE else name
        self._peaks[f"memory/{name}"] = max(self._peaks.get(f"memory/{name}", 0.0), value)

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        taken, self._peaks = self._peaks, {}
        return taken

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn allocation errors into DeviceMemoryError: who holds how much, and what to change."""
        try:
            yield
        except Exception as error:
            if not device_memory.is_out_of_memory(error):
                raise
            now = device_memory.read()
            where = f"GPU {torch.cuda.current_device()}" if torch.cuda.is_available() else "the host"
            raise DeviceMemoryError(
                f"no memory left on {where}: {device_memory.first_line(error)}. Of {now.total / GIB:.1f} GiB "
                f"{now.free / GIB:.2f} are free; held: {listed(self.holders(now))}. "
                f"{remedies(self.config, self.phase, self.group)}"
            ) from error

    # --- what the engine releases ------------------------------------------------------------------------------------

    def release(self, moves_in: int) -> Release:
        """Choose what the engine, which is resident now, has to release for a trainer that takes ``moves_in`` bytes and
        its activations. Collective over ranks with an engine: all release the same.

        Of the planned and the measured peak the larger counts: a batch that is fuller than those before needs more.
        """
        now, engine = device_memory.read(), self.engine()
        working = max(self.plan.working, self.measured.get(ACTIVATIONS, 0))
        needed = moves_in + with_margin(working, self._allowance)
        # what torch has reserved and does not use serves the trainer as well; the pool of the CUDA graphs does not
        room = now.free + (max(0, now.reserved - now.allocated - engine.graphs) if self._exact else 0)
        choice = agreed(choose_release(self.config, needed, room, engine.kv_cache + engine.graphs))
        if choice != self._reported:
            print(
                f"memory: the engine releases {choice.replace('_', ' ')} while the trainer works, which may need "
                f"{needed / GIB:.2f} GiB; {room / GIB:.2f} are free beside the engine"
            )
            self._reported = choice
        return choice


def agreed(choice: Release) -> Release:
    """Return the largest choice of all ranks. Collective."""
    number = torch.tensor(ORDER.index(choice))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return ORDER[int(number)]


def listed(sizes: Holders) -> str:
    """Return the sizes as text in GiB, the largest first, without those that round to 0."""
    parts = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size >= GIB // 200) or "nothing"
