"""Requests on their way to the engines of an open rollout, and their outputs on the way back."""

from __future__ import annotations

import msgspec
import pytest

from miles_spmd.controller.cluster.errors import EngineFailedError, WorkerFailedError
from miles_spmd.controller.cluster.listener import SEPARATOR
from miles_spmd.protocol.commands import AbortRequests, EndGenerate, Generate, RefitEngine, ReplaceEngines, Submit
from miles_spmd.protocol.messages import Call, Completions, Failure
from miles_spmd.protocol.results import Ok, RefitResult, Result
from miles_spmd.types.engine_group import POLICY
from miles_spmd.types.request import Output, Request, SamplingParams
from miles_spmd.types.trajectory import FinishReason
from tests.controller.harness import Make
from tests.controller.ranks import FakeRank


def request(number: int) -> Request:
    return Request(str(number), [1, 2, number], SamplingParams(max_new_tokens=4))


def output(rid: str, reason: FinishReason = FinishReason.STOP) -> Output:
    return Output(rid, [7], [-0.5], reason, [(0, 1)])


class FakeEngine:
    """Completes requests at once, except those in ``slow``, which have to be aborted."""

    def __init__(self, slow: tuple[str, ...] = ()) -> None:
        self.slow = slow

    def __call__(self, fake: FakeRank, call: Call) -> Result | Failure | None:
        match call.command:
            case Submit(requests):
                finished = [output(r.rid) for r in requests if own(r.rid) not in self.slow]
                if finished:
                    fake.send(Completions(fake.rank, finished))
            case AbortRequests(rids):
                fake.send(Completions(fake.rank, [output(rid, FinishReason.ABORT) for rid in rids]))
            case Generate():
                return None if fake.leader else Ok()  # a rank that steps does not reply before the end
            case EndGenerate():
                return Ok()
        return None


def own(rid: str) -> str:
    """The name that the request has in its rollout."""
    return rid.partition(SEPARATOR)[2]


def submitted(fake: FakeRank) -> list[str]:
    return [own(r.rid) for command in fake.received if isinstance(command, Submit) for r in command.requests]


def test_requests_go_round_the_engines_in_order_of_submission(cluster: Make) -> None:
    c = cluster(4)
    workers = c.add_all(FakeEngine(), engine_size=2)
    for _ in range(2):  # each session begins with the first engine again
        with workers.rollout(step=0) as session:
            session.submit([request(i) for i in range(3)])
            session.submit([request(3), request(4)])
            outputs = list(iter(session.next, None))
        assert sorted(o.rid for o in outputs) == ["0", "1", "2", "3", "4"]
    assert submitted(c.ranks[0]) == ["0", "2", "4"] * 2
    assert submitted(c.ranks[2]) == ["1", "3"] * 2
    assert all(c.ranks[rank].received == [Generate()] * 2 for rank in (1, 3))
    assert workers.seconds[3] == {"work": 1.0}


def test_one_engine_gets_all_requests_of_a_group(cluster: Make) -> None:
    c = cluster(2)
    workers = c.add_all(FakeEngine())
    with workers.rollout(step=0) as session:
        prompts = [msgspec.structs.replace(request(i), rid=f"{i // 2}.{i % 2}") for i in range(6)]
        session.submit(prompts)
        list(iter(session.next, None))
    assert submitted(c.ranks[0]) == ["0.0", "0.1", "2.0", "2.1"]
    assert submitted(c.ranks[1]) == ["1.0", "1.1"]


def test_later_turns_are_submitted_while_others_run(cluster: Make) -> None:
    workers = cluster(2).add_all(FakeEngine())
    seen = []
    with workers.rollout(step=0) as session:
        session.submit([request(0), request(1)])
        for finished in iter(session.next, None):
            seen.append(finished.rid)
            if int(finished.rid) < 6:
                session.submit([request(int(finished.rid) + 2)])
    assert sorted(seen) == [str(i) for i in range(8)]


def test_aborted_requests_come_back(cluster: Make) -> None:
    workers = cluster(2).add_all(FakeEngine(slow=("1", "2")))
    with workers.rollout(step=0) as session:
        session.submit([request(i) for i in range(4)])
        outputs = iter(session.next, None)
        assert {next(outputs).rid, next(outputs).rid} == {"0", "3"}
        session.abort(["2", "never submitted"])
        assert next(outputs) == output("2", FinishReason.ABORT)
        session.abort()
        assert [o.rid for o in outputs] == ["1"]


def test_leaving_a_rollout_early_aborts_the_rest(cluster: Make) -> None:
    c = cluster(1)
    workers = c.add_all(FakeEngine(slow=("0",)))
    with workers.rollout(step=0) as session:
        session.submit([request(0)])
    assert c.ranks[0].received[-2:] == [AbortRequests([f"0{SEPARATOR}0"]), EndGenerate()]
    with workers.rollout(step=1) as session:  # what was left over does not come up again
        session.submit([request(1)])
        assert [o.rid for o in iter(session.next, None)] == ["1"]


def test_an_evaluation_need_not_wait_for_a_rollout(cluster: Make) -> None:
    c = cluster(1)
    workers = c.add_all(FakeEngine(slow=("1",)))
    with workers.rollout(step=0) as session:
        session.submit([request(0), request(1)])
        with workers.rollout(step=0, purpose="evaluation") as other:
            other.submit([request(0)])
            assert [o.rid for o in iter(other.next, None)] == ["0"]
        assert EndGenerate() not in c.ranks[0].received
        outputs = iter(session.next, None)
        assert next(outputs) == output("0")
        session.abort()
        assert next(outputs) == output("1", FinishReason.ABORT)
    assert c.ranks[0].received.count(Generate()) == c.ranks[0].received.count(EndGenerate()) == 1


def test_a_command_is_executed_while_a_rollout_is_open(cluster: Make) -> None:
    def respond(fake: FakeRank, call: Call) -> Result | Failure | None:
        return RefitResult(3, 0, 0, 0) if isinstance(call.command, RefitEngine) else engine(fake, call)

    engine = FakeEngine(slow=("0",))
    workers = cluster(2).add_all(respond)
    with workers.rollout(step=0) as session:
        session.submit([request(0), request(1)])
        assert [result.version for result in workers.call(RefitEngine(3), step=0)] == [3, 3]
        assert [session.next()] == [output("1")]


def test_a_running_request_cannot_be_submitted_again(cluster: Make) -> None:
    workers = cluster(1).add_all(FakeEngine(slow=("0",)))
    with workers.rollout(step=0) as session:
        session.submit([request(0)])
        with pytest.raises(ValueError, match="'0' is already running"):
            session.submit([request(0)])


def test_a_failure_ends_a_rollout(cluster: Make) -> None:
    failure = Failure("ValueError", "request 1: 3 + 4 tokens exceed the context of 6")
    engine = FakeEngine()
    workers = cluster(2).add_all(
        lambda s, c: failure if s.rank == 1 and isinstance(c.command, Submit) else engine(s, c)
    )

    def rollout() -> None:
        with workers.rollout(step=5) as session:
            session.submit([request(0), request(1)])
            list(iter(session.next, None))

    with pytest.raises(WorkerFailedError, match=r"rank 1 \(node-a\), rollout, step 5: ValueError: request 1"):
        rollout()


# --- an engine fails -------------------------------------------------------------------------------------------------


class FailingEngine(FakeEngine):
    """Fails at the first request of ``breaks``, and is well again when it is replaced."""

    def __init__(self, breaks: str, slow: tuple[str, ...] = (), *, times: int = 1) -> None:
        super().__init__(slow)
        self.breaks, self.left = breaks, times
        self.generates: Call | None = None

    def __call__(self, fake: FakeRank, call: Call) -> Result | Failure | None:
        match call.command:
            case ReplaceEngines():
                return Ok()
            case RefitEngine(version):
                return RefitResult(version, 0, 0, 0)
            case Generate():
                self.generates = call
                return None
            case Submit(requests) if self.left and self.breaks in [own(r.rid) for r in requests]:
                self.left -= 1
                super().__call__(fake, msgspec.structs.replace(call, command=Submit(requests[:1])))
                return Failure("RuntimeError", "the engine is broken", engine=True)
        return super().__call__(fake, call)


def test_engines_are_replaced_after_one_has_failed(cluster: Make) -> None:
    """What was finished is kept, and what was not is submitted again, to all engines; they have the same weights."""
    c = cluster(2)
    workers = c.add_all(FailingEngine("2"))
    said: list[str] = []
    workers.engines[POLICY].replacements, workers.show = 1, said.append
    workers.call(RefitEngine(7), step=7)
    with workers.rollout(step=7) as session:
        session.submit([request(n) for n in range(2)])
        assert {session.next().rid for _ in range(2)} == {"0", "1"}  # type: ignore[union-attr]
        session.submit([request(n) for n in (2, 3, 4)])
        assert {session.next().rid for _ in range(3)} == {"2", "3", "4"}  # type: ignore[union-attr]
        assert session.next() is None
    first = c.ranks[0].received
    order = [type(command) for command in first]
    assert order[-5:] == [ReplaceEngines, RefitEngine, Generate, Submit, EndGenerate]
    assert first[order.index(ReplaceEngines) + 1] == RefitEngine(7)
    assert len(said) == 1
    assert said[0].startswith("rank 0 (node-a), rollout, step 7: RuntimeError: the engine is broken; the engines are")


def test_engines_are_replaced_so_often_and_no_more(cluster: Make) -> None:
    c = cluster(1)
    workers = c.add_all(FailingEngine("0", slow=("0",), times=3))
    workers.engines[POLICY].replacements, workers.show = 2, lambda text: None
    session = workers.rollout(step=0).__enter__()  # which is not left: its engine does not reply any more
    session.submit([request(0)])
    with pytest.raises(EngineFailedError, match="the engine is broken"):
        session.next()
    assert [type(command) for command in c.ranks[0].received].count(ReplaceEngines) == 2


def test_a_rank_that_fails_alone_ends_the_run(cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks of its engine wait for it in a collective."""
    monkeypatch.setattr("miles_spmd.controller.cluster.engines.ALIKE_SECONDS", 0.5)
    c = cluster(2)
    workers = c.add_all(FailingEngine("0", slow=("0",)), engine_size=2)
    workers.engines[POLICY].replacements = 3
    session = workers.rollout(step=0).__enter__()  # which is not left: its engine does not reply any more
    session.submit([request(0)])
    with pytest.raises(EngineFailedError, match="rank 0"):
        session.next()
    assert ReplaceEngines not in [type(command) for command in c.ranks[1].received]
