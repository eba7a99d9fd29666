"""A fault that is injected into a run, read from a text such as ``kill:rank1@train.3``, and what is wrong with it.

A fault strikes once, in one phase of one step; one in a start strikes in the first start by which all faults that are
listed before it have struck. Steps are numbered as in the messages of a run: rollout, log_probs and train have that of
the rollout, refit, eval and save the number of steps that are done.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from miles_spmd.config import Config

START = "start"
PHASES = (START, "refit", "eval", "save", "rollout", "log_probs", "train")  # in the order of the steps' numbers
OF_STEPS = PHASES[1:]
REWARDED = ("rollout", "eval")
NUMBER = "[0-9]{1,9}"
# The settings that decide when which phase comes.
USED = (
    *("run.mode", "run.num_rollout", "checkpoint.save_interval", "checkpoint.save_final", "checkpoint.keep_last"),
    *("refit.update_weights_interval", "eval.eval_interval", "eval.eval_prompt_data", "eval.sets", "reward.rm_type"),
)


@dataclass(frozen=True)
class Kind:
    """One kind of fault. ``processes``: those that it can strike, the default first; "rank" is one of them, by default
    the last one."""

    meaning: str
    processes: tuple[str, ...]
    phases: tuple[str, ...] = PHASES
    ends: bool = True  # it ends the run, unless it strikes a process of the rewards


KINDS: dict[str, Kind] = {
    "kill": Kind("the process is killed by SIGKILL", ("rank", "controller", "launcher", "reward")),
    "term": Kind("the process gets SIGTERM, a request to stop", ("launcher", "rank", "controller")),
    "stop": Kind("the process is suspended by SIGSTOP, which is a hang", ("rank", "controller", "reward")),
    "slow": Kind("the rank takes five times as long in the phase", ("rank",), OF_STEPS, ends=False),
    "lost": Kind("one message from the controller to the rank is dropped", ("rank",), OF_STEPS),
    "diskfull": Kind("no file can grow: of the ranks in a save, else of the controller", ("", "rank", "controller"),
                     OF_STEPS, ends=False),
    "corrupt": Kind("a bit of the checkpoint is flipped when it is complete, and the run is killed", ("",), ("save",)),
}  # fmt: skip


class Fault(msgspec.Struct, frozen=True):
    """``process`` is "rank1", "controller", "launcher", "reward", or "" where the kind decides."""

    kind: str
    process: str
    phase: str
    step: int = 0
    of_cell: bool = False  # it can only end a cell, without which the run goes on

    def __str__(self) -> str:
        return f"{self.kind}{self.process and ':'}{self.process}@{self.place}"

    @property
    def place(self) -> str:
        return self.phase if self.phase == START else f"{self.phase}.{self.step}"

    @property
    def rank(self) -> int:
        """The number of the rank that is its process."""
        return int(self.process.removeprefix("rank"))

    @property
    def ends(self) -> bool:
        """Whether the run surely ends by it."""
        return KINDS[self.kind].ends and self.process != "reward" and not self.of_cell

    @property
    def order(self) -> tuple[int, int]:
        """Of faults in steps, by the time at which they strike."""
        return self.step, PHASES.index(self.phase)


def read_faults(
    text: str, config: Config, world_size: int, without: Collection[str] = ()
) -> tuple[list[Fault], list[str]]:
    """Return the faults that ``text`` lists, with commas between them, and all errors: of the texts, and of faults that
    cannot strike a run of ``config`` with ``world_size`` ranks in each cell. Nothing is concluded from the settings
    ``without``."""
    cells = config.resilience.cells
    parts = [part.strip() for part in text.split(",") if part.strip()]
    faults, errors = list[Fault](), list[str]()
    moments = None if {*USED} & {*without} else steps_by_phase(config)
    for part in parts:
        fault, problems = _read(part, cells * world_size)
        if fault is not None:
            if cells > 1 and fault.process.startswith("rank") and fault.phase != START:
                fault = msgspec.structs.replace(fault, of_cell=True)
            faults.append(fault)
            problems += [] if moments is None else _impossible(fault, config, moments)
        errors += [f"--faults: {part}: {problem}" for problem in problems]
    errors += [f"--faults: {problem}" for problem in _order(faults)]
    if not parts:
        errors.append("--faults: names none; write for example --faults kill:rank0@train.1,term@rollout.2")
    return faults, errors


def steps_by_phase(config: Config) -> dict[str, Collection[int]]:
    """Return the steps in which each phase comes, in a run that is not disturbed."""
    steps, save, trains = config.run.num_rollout, config.checkpoint, range(config.run.num_rollout)
    generates, last = config.run.mode == "rl", config.run.num_rollout
    intervals = [one.eval_interval for one in config.eval_sets if one.eval_interval]
    evals = {s for s in range(steps + 1) for n in intervals if s in (0, last) or s % n == 0}
    interval = config.refit.update_weights_interval
    refits = {s for s in range(steps + 1) if s % interval == 0} if generates else set[int]()
    return {
        "rollout": trains if generates else (),
        "log_probs": trains if generates or config.has_reference else (),
        "train": trains,
        "refit": refits if config.trains_on_pairs else refits | evals,
        "eval": evals,
        "save": {s for s in trains if s and save.save_interval and s % save.save_interval == 0}
        | {s for s in [last] if save.save_final or (save.save_interval and s % save.save_interval == 0)},
    }


# --- one fault --------------------------------------------------------------------------------------------------------


def _read(text: str, world_size: int) -> tuple[Fault | None, list[str]]:
    found = re.fullmatch(r"([^:@]*)(?::([^@]*))?@([^.]*)(?:\.(.*))?", text)
    if found is None:
        return None, ["is not KIND[:PROCESS]@PHASE.STEP, such as kill:rank1@train.3 or term@start"]
    kind, process, phase, number = found.groups()
    errors = list[str]()
    if kind not in KINDS:
        errors.append(_unknown("kind", kind, KINDS))
    if phase not in PHASES:
        errors.append(_unknown("phase", phase, PHASES))
    elif phase == START and number is not None:
        errors.append("a start has no step: write @start; it is the first one after the faults listed before it")
    elif phase != START and not re.fullmatch(NUMBER, number or ""):
        errors.append(f"a phase of a step has its number: write @{phase}.STEP, such as @{phase}.1")
    if kind in KINDS:
        process, problem = _process(kind, process, world_size)
        errors += [problem] if problem else []
    if kind in KINDS and phase in PHASES and phase not in KINDS[kind].phases:
        errors.append(f"{kind} cannot strike in the phase {phase}; it can in {', '.join(KINDS[kind].phases)}")
    if errors:
        return None, errors
    return Fault(kind, process or "", phase, int(number or 0)), []


def _process(kind: str, process: str | None, world_size: int) -> tuple[str, str]:
    """Return the process that a text names, or the default, and what is wrong with it."""
    allowed, last = KINDS[kind].processes, f"rank{world_size - 1}"
    if process is None:
        return last if allowed[0] == "rank" else allowed[0], ""
    number = re.fullmatch(f"rank({NUMBER})", process)
    if number and "rank" in allowed:
        inside = int(number[1]) < world_size
        ranks = f"rank0 to {last}" if world_size > 1 else "rank0 alone"
        return (
            f"rank{int(number[1])}",
            "" if inside else f"the run has {ranks}: raise --nproc-per-node, or name another",
        )
    if process in allowed and process not in ("", "rank"):
        return process, ""
    names = [name.replace("rank", "rankN") for name in allowed if name]
    if not names:
        return "", f"{kind} has no process: write {kind}@PHASE.STEP"
    if process in {name for one in KINDS.values() for name in one.processes if name} or number:
        return "", f"{kind} cannot strike {process}; it can strike {', '.join(names)}"
    return "", _unknown("process", process, names)


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"unknown {what} {name!r}; {'did you mean ' + near[0] if near else 'there are ' + ', '.join(known)}"


def _impossible(fault: Fault, config: Config, moments: Mapping[str, Collection[int]]) -> Iterator[str]:
    """Why a fault would never strike, or could not be survived."""
    if fault.process == "reward":
        if fault.phase not in REWARDED:
            yield f"rewards are computed in {' and '.join(REWARDED)}, not in {fault.phase}"
        elif not {term.rm_type for term in config.reward.terms} - {"exact"}:
            yield "reward.rm_type = 'exact' has no process of its own: the controller computes it"
    if fault.phase == START or fault.step in moments[fault.phase]:
        if fault.kind == "corrupt":
            yield from _no_other_checkpoint(fault, config, moments["save"])
        return
    settings = {
        "save": "checkpoint.save_interval",
        "eval": "eval.eval_prompt_data and eval.eval_interval",
        "refit": "run.mode",
        "rollout": "run.mode",
        "log_probs": "run.mode",
    }
    steps = sorted(moments[fault.phase])
    if not steps:
        yield f"this run has no {fault.phase}: {settings[fault.phase]} would give it one"
    elif fault.step > steps[-1]:
        yield f"the last {fault.phase} is {fault.phase}.{steps[-1]}, with run.num_rollout = {config.run.num_rollout}"
    else:
        near = min(steps, key=lambda step: (abs(step - fault.step), step))
        yield f"step {fault.step} has no {fault.phase}; the nearest is {fault.phase}.{near}"


def _no_other_checkpoint(fault: Fault, config: Config, saves: Collection[int]) -> Iterator[str]:
    before = [step for step in saves if step < fault.step]
    if not before:
        yield f"no checkpoint is before it, so the run could not continue; the first with one is save.{_second(saves)}"
    elif config.checkpoint.keep_last == 1:
        yield "checkpoint.keep_last = 1 leaves no checkpoint before it; keep 2 or more"


def _second(saves: Collection[int]) -> str:
    return str(sorted(saves)[1]) if len(saves) > 1 else "N of a run that saves twice: lower checkpoint.save_interval"


# --- several ----------------------------------------------------------------------------------------------------------


def _order(faults: list[Fault]) -> Iterator[str]:
    places = [fault.place for fault in faults if fault.phase != START]
    for place in dict.fromkeys(place for place in places if places.count(place) > 1):
        both = " and ".join(str(fault) for fault in faults if fault.place == place)
        yield f"{both} would strike at the same moment; give each a step or a phase of its own"
    for number, fault in enumerate(faults):
        before = [one for one in faults[:number] if one.phase != START]
        if fault.phase == START and before and not (latest := max(before, key=lambda one: one.order)).ends:
            yield (
                f"{fault} is listed after {latest}, which does not end the run, so no start comes after it; "
                f"list {fault} before it, or after a fault that ends the run"
            )
