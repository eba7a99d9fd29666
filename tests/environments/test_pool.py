"""Processes of environments: whatever one episode does, it is the only one that fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from miles_spmd.config.environment import EnvironmentConfig
from miles_spmd.environments.context import ModelSource
from miles_spmd.environments.messages import Ask, Begin, Cancel, Completed, Event, Failed, Finished
from miles_spmd.environments.pool import EnvironmentPool
from miles_spmd.plugins.environment import EnvironmentSetupError
from miles_spmd.quickstart.assets import build_assets
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason

GOOD = 6  # episodes beside the one that misbehaves


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    build_assets(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def pool(tokenizer: Path) -> Iterator[EnvironmentPool]:
    made = make(tokenizer, environment_timeout=1.0, environment_workers=1)
    yield made
    made.close()


def make(tokenizer: Path, environment: str = "behave", **settings: Any) -> EnvironmentPool:
    name = environment if ":" in environment else f"tests.environments.samples:{environment}"
    model = ModelSource(tokenizer, 128, 64, "2026-01-01")
    return EnvironmentPool(EnvironmentConfig(environment=name, **settings), model, None)


def begin(number: int, label: str = "") -> Begin:
    return Begin(number, Prompt(f"p:{number}", "", [7, number % 30], label), 0, 10)


def play(pool: EnvironmentPool, begins: list[Begin], seconds: float = 30) -> dict[int, list[Event]]:
    """Sample [1, 2, number of the segment] whenever asked, and return all events by episode."""
    events: dict[int, list[Event]] = {one.episode: [] for one in begins}
    for one in begins:
        pool.send(one)
    end = time.monotonic() + seconds
    while any(not found or isinstance(found[-1], Ask) for found in events.values()):
        assert time.monotonic() < end, events
        if not pool.events:
            time.sleep(0.01)
            continue
        event = pool.events.popleft()
        events[event.episode].append(event)
        if isinstance(event, Ask):
            tokens = [1, 2, event.segment][: event.max_new_tokens]
            pool.send(Completed(event.episode, event.segment, tokens, FinishReason.LENGTH))
    return events


def test_tokens_travel_once(pool: EnvironmentPool) -> None:
    (events,) = play(pool, [begin(100)]).values()
    first, second, end = events
    assert isinstance(first, Ask)
    assert isinstance(second, Ask)
    assert isinstance(end, Finished)
    assert (first.line.start, first.line.segments, first.given, first.max_new_tokens) == ([7, 10], [], {}, 2)
    assert (second.line.segments, second.given, second.max_new_tokens) == ([0, 1], {1: [50]}, 7)
    (trajectory,) = end.ends
    assert (trajectory.line.segments, end.given, end.metrics) == ([0, 1, 2], {}, {"calls": 2.0})


def test_siblings_share_segments(pool: EnvironmentPool) -> None:
    (events,) = play(pool, [begin(101, "fork")]).values()
    end = events[-1]
    assert isinstance(end, Finished)
    assert [one.line.number for one in end.ends] == [0, 1]
    lines = [one.line.segments for one in end.ends]
    assert lines[0][:2] == lines[1][:2]
    assert lines[0][2] != lines[1][2]


BEHAVIOUR = {
    "raise": ("raised", "raised ValueError: no luck"),
    "exit": ("raised", "raised SystemExit: 3"),
    "leave": ("died", "its process ended: exit code 3"),
    "kill": ("died", "killed by SIGKILL"),
    "spawn": ("died", "its process ended: exit code 4"),
    "block": ("timeout", "took longer than environment.environment_timeout = 1 s, and blocked its process"),
    "wait": ("timeout", "took longer than environment.environment_timeout = 1 s"),
    "memory": ("raised", "raised MemoryError"),
    "number": ("unusable", "returned int instead of a trajectory"),
    "nothing": ("unusable", "returned list instead of a trajectory"),
    "unsampled": ("unusable", "returned no token that the policy has sampled"),
    "unknown": ("unusable", "gave the token 128; the model has the tokens 0 to 127"),
    "invent": ("unusable", "claims to be sampled"),
    "text": ("unusable", "Expected `str`, got `int` - at `$.ends[0].text`"),
    "surrogate": ("unusable", "surrogates not allowed"),
    "messages": ("unusable", "Encoding objects of type object is unsupported"),
    "reason": ("unusable", "Invalid enum value 'tired' - at `$.ends[0].finish_reason`"),
    "reward": ("unusable", "gave 'reward' the value nan"),
    "detail": ("unusable", "gave 'score' the value inf"),
    "start": ("unusable", "has another start than it began with"),
    "order": ("unusable", "sampled segment behind other tokens than it was sampled behind"),
    "gap": ("unusable", "sampled segment behind other tokens than it was sampled behind"),
    "disguised": ("unusable", "claims to be given, and was sampled"),
    "truth": ("unusable", "gave the token True"),
}
MISUSE = {
    "no start": ("unusable", "began a trajectory without a token"),
    "letters": ("unusable", "stop = 'END'; it is a list of strings"),
    "numbers": ("unusable", "gave context.complete what it cannot use: Expected `str`, got `int`"),
    "name": ("unusable", "gave 5 the value 1.0"),
    "infinite": ("unusable", "gave 'score' the value inf"),
    "thread": ("unusable", "awaited context.complete in another event loop"),
    "unspeakable": ("raised", "raised Unspeakable"),
    "interrupt": ("raised", "raised KeyboardInterrupt"),
    "cancelled": ("raised", "raised CancelledError"),
    "task": ("raised", "raised RuntimeError: a task of an environment ended with SystemExit: 4"),
    "other's": ("unusable", "does not come from context.begin or context.fork"),
}


@pytest.mark.parametrize("label", BEHAVIOUR)
def test_one_episode_fails_alone(pool: EnvironmentPool, label: str) -> None:
    kind, problem = BEHAVIOUR[label]
    base = 200 + 10 * list(BEHAVIOUR).index(label)
    events = play(pool, [begin(base + n, label if n == 2 else "") for n in range(GOOD)])
    failed = events[base + 2][-1]
    assert isinstance(failed, Failed)
    assert (failed.own, failed.kind) == (True, kind)
    assert problem in failed.problem
    others = [found[-1] for number, found in events.items() if number != base + 2]
    assert all(isinstance(one, Finished) or not one.own for one in others)
    again = play(pool, [begin(base + 9)])  # the pool goes on
    assert isinstance(again[base + 9][-1], Finished)


def test_what_an_environment_does_wrong_is_its_own_failure(tokenizer: Path) -> None:
    pool = make(tokenizer, "misuse", environment_timeout=20.0, environment_workers=1)
    try:
        events = play(pool, [begin(n, label) for n, label in enumerate([*MISUSE, "nothing"])], seconds=10)
    finally:
        pool.close()
    for number, (kind, problem) in enumerate(MISUSE.values()):
        failed = events[number][-1]
        assert isinstance(failed, Failed)
        assert (failed.own, failed.kind) == (True, kind)
        assert problem in failed.problem
    assert isinstance(events[len(MISUSE)][-1], Finished)


def test_what_does_not_fit_behind_the_last_response_is_left_out(tokenizer: Path) -> None:
    pool = make(tokenizer, "overflowing", environment_workers=1)
    try:
        events = play(pool, [begin(0)])[0]
    finally:
        pool.close()
    end = events[-1]
    assert isinstance(end, Finished)
    assert [one.max_new_tokens for one in events[:-1] if isinstance(one, Ask)] == [2, 2]  # of 10, with 5 between
    assert (end.ends[0].line.segments, end.given) == ([0, 1, 2], {})


def test_an_episode_that_does_not_let_go_is_ended_with_its_process(tokenizer: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("miles_spmd.environments.pool.GRACE", 0.5)
    pool = make(tokenizer, environment_timeout=0.5, environment_workers=1)
    try:
        before = pool._workers[0].child.process.pid
        (events,) = play(pool, [begin(0, "cling")]).values()
        assert isinstance(events[-1], Failed)
        assert events[-1].kind == "timeout"
        end = time.monotonic() + 10
        while psutil.pid_exists(before) and psutil.Process(before).status() != "zombie":
            assert time.monotonic() < end
            time.sleep(0.05)
        assert isinstance(play(pool, [begin(1)])[1][-1], Finished)
    finally:
        pool.close()


def test_a_process_whose_memory_has_leaked_is_replaced(tokenizer: Path) -> None:
    pool = make(tokenizer, environment_memory_gib=1.0, environment_workers=1)
    try:
        for number in (0, 10):
            assert isinstance(play(pool, [begin(number, "leak")])[number][-1], Finished)
            full, other = (found[-1] for found in play(pool, [begin(number + 1, "leak"), begin(number + 2)]).values())
            assert isinstance(full, Failed)
            assert (full.kind, full.problem, full.own) == ("raised", "raised MemoryError", True)
            assert isinstance(other, Finished) or (other.kind, other.own) == ("interrupted", False)
    finally:
        pool.close()


def test_further_episodes_wait_for_room(tokenizer: Path) -> None:
    pool = make(tokenizer, environment_concurrency=2, environment_workers=1)
    try:
        for number in range(5):
            pool.send(begin(number))
        time.sleep(0.5)
        assert sorted(event.episode for event in pool.events) == [0, 1]
        for number in (0, 4):  # one that runs, and one that waits
            pool.send(Cancel(number))
        end = time.monotonic() + 10
        while len(pool.events) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert [event.episode for event in pool.events][2:] == [2]
    finally:
        pool.close()


def test_an_evaluation_does_not_wait_for_episodes_that_wait_for_it(tokenizer: Path) -> None:
    pool = make(tokenizer, environment_concurrency=1, environment_workers=1)
    try:
        for number in range(2):  # one that waits for the policy, and one that waits for room
            pool.send(begin(number))
        while not pool.events:
            time.sleep(0.01)
        assert pool.events.popleft().episode == 0
        held_out = [msgspec.structs.replace(begin(number), purpose="evaluation") for number in (2, 3)]
        events = play(pool, held_out, seconds=10)
        assert all(isinstance(found[-1], Finished) for found in events.values())
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("nowhere:f", {}, "cannot be imported"),
        ("not_async", {}, "is not an `async def`"),
        ("behave", {"wrong": 1}, "cannot be called with (context, prompt) and environment_kwargs"),
        ("unknown", {}, "cannot be imported"),
    ],
)
def test_an_environment_that_cannot_be_called(
    tokenizer: Path, name: str, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(EnvironmentSetupError, match=r"environment\.environment = ") as caught:
        make(tokenizer, name, environment_kwargs=arguments, environment_workers=1)
    assert problem in str(caught.value)


def test_time_does_not_run_while_one_of_two_requests_is_with_the_policy(tokenizer: Path) -> None:
    pool = make(tokenizer, environment_timeout=1.0, environment_workers=1)
    try:
        pool.send(begin(1, "fork"))
        (first,) = asks(pool, 1)
        pool.send(Completed(1, first.segment, [1, 2], FinishReason.LENGTH))
        both = asks(pool, 2)
        pool.send(Completed(1, both[0].segment, [1], FinishReason.LENGTH))
        time.sleep(2.5)  # more than the limit, in which only the policy is at work
        assert not pool.events
        pool.send(Completed(1, both[1].segment, [1], FinishReason.LENGTH))
        (one,) = wait_for_events(pool, 1)
        assert isinstance(one, Finished)
    finally:
        pool.close()


def asks(pool: EnvironmentPool, count: int) -> list[Ask]:
    return [event for event in wait_for_events(pool, count) if isinstance(event, Ask)]


def wait_for_events(pool: EnvironmentPool, count: int) -> list[Event]:
    end = time.monotonic() + 30
    while len(pool.events) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
    return [pool.events.popleft() for _ in range(count)]
