"""Which ranks are slower than their peers, by the time of their own work.

In a collective all ranks take as long as the slowest one. What is compared is therefore the work before ranks wait for
others: of engines the time in which they step, and of the trainer that of forward and backward passes until the
gradients are summed. Ranks that wait for each other within these (one engine, one model replica) count as one unit,
because their times are equal whichever of them is slow. Times are divided by what a unit had to do: tokens, or engine
steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from miles_spmd.protocol.last_words import warn
from miles_spmd.protocol.messages import OwnWork, RankInfo
from miles_spmd.telemetry.stragglers import Row, Stragglers, write_stragglers
from miles_spmd.types.phase import Phase

SLOW = 1.3  # times its peers' time
PERSISTS = 3  # consecutive steps, before a warning
MATTERS = 0.1  # seconds that a unit costs a step, or it is not worth a warning
WINDOW = 100  # steps that the report shows
UNITS_SHOWN = 64  # of each phase in the file, the slowest
AMOUNTS = {Phase.ROLLOUT: "engine step", Phase.LOG_PROBS: "token", Phase.TRAIN: "token"}

Own = Mapping[tuple[Phase, int], OwnWork]  # by phase and rank


@dataclass
class _History:
    """One unit in one phase."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    slow_steps: int = 0  # until now, without a break
    warned: bool = False


class StragglerWatch:
    """Compares the units in every step; ``run_dir``: where the report's file is written; ``warn`` receives one warning
    about each unit that stays slow in a phase."""

    def __init__(self, run_dir: Path, warn: Callable[[str], None] = warn) -> None:
        self._run_dir, self._warn = run_dir, warn
        self._history: dict[tuple[Phase, tuple[int, ...]], _History] = {}
        self._steps: deque[int] = deque(maxlen=WINDOW)
        self._infos: dict[int, RankInfo] = {}  # also of ranks that have gone

    def add(self, step: int, own: Own, infos: Sequence[RankInfo]) -> dict[str, float]:
        """Take the work of the ranks in ``step``, and return its metrics; none where no unit has a peer."""
        metrics: dict[str, float] = {}
        self._infos |= {info.rank: info for info in infos}
        for phase in AMOUNTS:
            of_phase = {rank: work for (of, rank), work in own.items() if of is phase}
            units = _units(phase, of_phase, self._infos)
            # the engines of a group are peers: others have another model
            groups = sorted({info.group for info in self._infos.values()})
            peers = [{u: w for u, w in units.items() if self._infos[u[0]].group == group} for group in groups]
            compared = [self._compare(step, phase, units) for units in peers if len(units) > 1]
            if compared:
                metrics[f"perf/{phase}_slowest"] = max(compared)
        if metrics:
            self._steps.append(step)
            write_stragglers(self._run_dir, self._report())
        return metrics

    def _compare(self, step: int, phase: Phase, units: Mapping[tuple[int, ...], OwnWork]) -> float:
        rates = {unit: work.seconds / work.amount for unit, work in units.items()}
        ordered, slowest = sorted(rates.values()), 0.0
        for unit, work in units.items():
            peers = _median_of_others(ordered, rates[unit])
            history = self._history.setdefault((phase, unit), _History())
            ratio = rates[unit] / peers
            history.seconds.append(work.seconds)
            history.ratios.append(ratio)
            slow = ratio >= SLOW and work.seconds - peers * work.amount >= MATTERS
            history.slow_steps = history.slow_steps + 1 if slow else 0
            slowest = max(slowest, ratio)
            if history.slow_steps >= PERSISTS and not history.warned:
                history.warned = True
                self._warn(
                    f"{_name(unit, self._infos)}: {ratio:.2f} x as slow as its peers in {phase} in each of the "
                    f"{PERSISTS} steps up to {step}: {work.seconds:.2f} s of its own work instead of "
                    f"{peers * work.amount:.2f} s, compared per {AMOUNTS[phase]}"
                )
        return slowest

    def _report(self) -> Stragglers:
        rows = [
            Row(
                phase=str(phase),
                ranks=list(unit),
                hosts=sorted({self._infos[rank].host for rank in unit}),
                devices=[self._infos[rank].device for rank in unit],
                median=median(history.seconds),
                longest=max(history.seconds),
                ratio=median(history.ratios),
                slow=history.warned,
            )
            for (phase, unit), history in self._history.items()
        ]
        shown = []
        for phase in AMOUNTS:
            of_phase = sorted((row for row in rows if row.phase == phase), key=lambda row: -row.ratio)
            shown += of_phase[:UNITS_SHOWN]
        return Stragglers(self._steps[0], self._steps[-1], shown)


def _median_of_others(ordered: Sequence[float], own: float) -> float:
    at = bisect_left(ordered, own)
    others = [*ordered[:at], *ordered[at + 1 :]]
    return (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2


def _units(phase: Phase, own: Mapping[int, OwnWork], infos: Mapping[int, RankInfo]) -> dict[tuple[int, ...], OwnWork]:
    """Return the work of the ranks that wait for each other in ``phase``, by these ranks: the longest of theirs."""
    members: dict[tuple[str, int], list[int]] = {}
    for rank, work in own.items():
        info = infos[rank]
        if work.amount > 0 and work.seconds > 0:
            if phase is Phase.ROLLOUT and info.engine is not None:
                members.setdefault((info.group, info.engine.engine), []).append(rank)
            elif phase is not Phase.ROLLOUT and info.trainer is not None:
                members.setdefault((info.group, info.trainer.unit), []).append(rank)
    return {
        tuple(ranks): OwnWork(max(own[rank].seconds for rank in ranks), max(own[rank].amount for rank in ranks))
        for ranks in map(sorted, members.values())
    }


def _name(unit: Sequence[int], infos: Mapping[int, RankInfo]) -> str:
    names = []
    for rank in unit:
        info = infos[rank]
        names.append(f"rank {rank} ({', '.join(filter(None, [info.host, info.device]))})")
    return ", ".join(names) + (" together, which wait for each other" if len(unit) > 1 else "")
