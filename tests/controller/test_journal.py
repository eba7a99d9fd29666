"""Events of a step and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles_spmd.controller import attempts
from miles_spmd.controller.journal.events import (
    BatchStarted,
    Event,
    Measured,
    MetricsReported,
    PhaseFinished,
    PhaseStarted,
    StepFinished,
    UpdateFinished,
)
from miles_spmd.controller.journal.journal import Journal, Writers
from miles_spmd.controller.journal.metrics import Metrics
from miles_spmd.telemetry.texts import StepLines
from miles_spmd.telemetry.trackers import Trackers
from miles_spmd.types.role import Role
from tests.controller.ranks import info_of


class Cluster:
    infos = (info_of(0, 2), info_of(1, 2))

    @property
    def cells(self) -> Cluster:
        return self

    def metrics(self) -> dict[str, float]:
        return {}

    def take_own(self) -> dict[Any, Any]:
        return {}

    def take_gpus(self) -> list[Any]:
        return []

    def take_memory(self) -> dict[str, float]:
        return {"memory/train": 1.5}


class Collector:
    head = "abc"

    def __init__(self) -> None:
        self.events: list[Event] = []

    def observe(self, event: Event) -> None:
        self.events.append(event)


def journal(*observers: Any, ledger: Any = None) -> Journal:
    return Journal(Metrics(Cluster(), Path("unused")), observers, ledger)  # type: ignore[arg-type]


def update(**metrics: float) -> UpdateFinished:
    return UpdateFinished(1, Role.ACTOR, [], [], [], {f"train/{name}": value for name, value in metrics.items()})


def test_a_report_has_what_happened_since_the_last_one() -> None:
    collector = Collector()
    run = journal(collector)
    for tokens in (10, 20):
        run.publish(BatchStarted(1, tokens))
    run.publish(update(loss=1.0, lr=0.5))
    run.publish(update(loss=2.0))
    for difference in (0.25, 0.125):
        run.publish(Measured(1, {"parity/max_abs_diff": difference}))
    run.report(1)
    run.report(2)
    first, second = [event for event in collector.events if isinstance(event, MetricsReported)]
    times = {name: value for name, value in first.metrics.items() if name.startswith("perf/")}
    assert times.keys() == {"perf/step_time", "perf/tokens_per_gpu_per_second"}
    assert times["perf/tokens_per_gpu_per_second"] == pytest.approx(15 / times["perf/step_time"])
    assert {name: value for name, value in first.metrics.items() if name not in times} == {
        "train/tokens": 30.0,
        "train/loss": 1.5,
        "train/lr": 0.5,
        "parity/max_abs_diff": 0.125,
        "memory/train": 1.5,
    }
    assert (first.step, second.step) == (1, 2)
    assert second.metrics.keys() == {"perf/step_time", "memory/train"}


def test_a_phase_ends_and_is_counted_when_its_block_raises(tmp_path: Path) -> None:
    class Display:
        phases: list[str] = []

        def phase(self, name: str) -> None:
            self.phases.append(name)

        def update(self, step: int, metrics: object) -> None: ...

    def fails() -> None:
        with run.timed("rollout", 0):
            raise KeyError("x")

    collector = Collector()
    attempt = attempts.begin(tmp_path, "train", 1)
    writers = Writers(None, Trackers([]), Display(), attempt, StepLines("x", 1))  # type: ignore[arg-type]
    run = journal(collector, writers)
    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
    assert Display.phases == ["rollout", ""] * 2
    run.report(1)
    *events, reported = collector.events
    seconds = sum(event.seconds for event in events if isinstance(event, PhaseFinished))
    assert isinstance(reported, MetricsReported)
    assert reported.metrics["perf/rollout_time"] == seconds > 0


def test_the_ledger_sees_every_event_and_its_time_is_counted() -> None:
    collector, ledger = Collector(), Collector()
    run = journal(collector, ledger=ledger)
    run.publish(Measured(1, {}))
    assert collector.events == [Measured(1, {})]
    run.publish(StepFinished(1))
    _, finished, started, ended = collector.events
    assert (finished, started) == (StepFinished(1), PhaseStarted("ledger", 1))
    assert isinstance(ended, PhaseFinished)
    assert [event for event in ledger.events if isinstance(event, StepFinished)] == [StepFinished(1)]
    assert run.ledger_head == "abc"
    assert journal().ledger_head == ""
