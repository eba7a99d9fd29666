"""Which cell the controller goes on without, before ranks that follow the protocol and compute nothing."""

from __future__ import annotations

import re
import time

import pytest

from miles_spmd.config.resilience import ResilienceConfig
from miles_spmd.controller.cluster.errors import WorkerSilentError
from miles_spmd.protocol.commands import ComputePart, Generate, MakeUpdate, RefitEngine, TrainStep
from miles_spmd.protocol.messages import Call, Heartbeat, Overdue, StopNotice
from miles_spmd.protocol.pipe import StartCell, ToSupervisor
from miles_spmd.protocol.results import Ok, PartResult, Result, UpdateResult
from tests.controller.harness import Harness, Make
from tests.controller.ranks import FakeRank, Response, empty


def divided(cluster: Make, *respond: Response) -> tuple[Harness, list[str], list[ToSupervisor]]:
    """Return a cluster of cells of one rank each, what is said about them, and the orders to the supervisor."""
    made, said, orders = cluster(len(respond), cells=len(respond)), list[str](), list[ToSupervisor]()
    made.workers.cells.configure(ResilienceConfig(cells=2), orders.append)
    made.workers.cells.show = said.append
    for rank, of_rank in enumerate(respond):
        made.add(rank, of_rank)
    made.workers.wait_ready()
    return made, said, orders


def is_told_to_stop(rank: FakeRank, call: Call) -> None:
    rank.send(StopNotice(rank.rank, "SIGTERM"))


def is_told_to_stop_and_goes_on(rank: FakeRank, call: Call) -> Result:
    is_told_to_stop(rank, call)
    return empty(call.command)


def works(rank: FakeRank, call: Call) -> Result:
    return empty(call.command)


def test_a_signal_to_one_cell_is_its_end(cluster: Make) -> None:
    made, said, orders = divided(cluster, works, is_told_to_stop)
    asked = list[str]()
    made.workers.pass_requests(asked.append, lambda: False)
    assert made.workers.call(RefitEngine(0), step=3) == [empty(RefitEngine(0))]
    (lost,) = said
    assert re.match(r"refit, step 3: rank 1 \(node-a, pid 1001\) was stopped by SIGTERM; the run goes on without", lost)
    (order,) = orders
    assert isinstance(order, StartCell)
    assert order.cell == 1
    assert asked == []


def test_a_signal_to_all_cells_stops_the_run(cluster: Make) -> None:
    """As at the end of a job, which signals the processes of all its steps."""
    made, said, orders = divided(cluster, *[is_told_to_stop_and_goes_on] * 4)
    asked = list[str]()
    made.workers.pass_requests(asked.append, lambda: bool(asked))
    assert len(made.workers.call(RefitEngine(0), step=3)) == 4
    assert asked == ["SIGTERM"]
    assert said == orders == []


@pytest.mark.parametrize("hangs", [0, 1])
def test_an_engine_that_does_not_return_from_a_step(cluster: Make, hangs: int) -> None:
    """The other cell has not replied, either: its engine serves the rollout."""

    def serves(rank: FakeRank, call: Call) -> Result | None:
        if rank.rank == hangs:
            return rank.send(Overdue(rank.rank, ["forward (model.py:1)"], [], engine_step=0.5))
        time.sleep(3.0)
        return Ok()

    made, said, _ = divided(cluster, serves, serves)
    call = made.workers.begin(Generate(), step=3)
    assert made.workers.wait(call) == [Ok()]
    (lost,) = said
    first, *lines = lost.splitlines()
    assert first == f"rollout, step 3: the engine of rank {hangs} did not return from a step within 0.5 s"
    assert lines[0] == f"  rank {hangs} in forward (model.py:1)"
    assert lines[-1].endswith(f"; the run goes on without cell {hangs} (node-a), which is started again")


@pytest.mark.parametrize("severed", [1, 2])
def test_cells_that_do_not_reach_each_other(cluster: Make, severed: int) -> None:
    """The controller hears all of them, so that none is silent. The run goes on without the one that came last, which
    is started again."""
    updates = [0] * 4

    def trains(rank: FakeRank, call: Call) -> Result:
        match call.command:
            case ComputePart():
                return PartResult([{}])
            case MakeUpdate():
                updates[rank.rank] += 1
                cannot = not any(f"without cell {severed} " in line for line in said)
                return UpdateResult(1.0, lost="no answer" if cannot else "")
        return empty(call.command)

    made, said, orders = divided(cluster, *[trains] * 4)
    made.workers.cells._joined(severed)
    results = made.workers.train([TrainStep([])] * 4, step=3)
    assert [result.grad_norm for result in results] == [1.0] * 4
    (lost,) = said
    why, _, then = lost.partition("; ")
    assert why == "train, step 3: cells have failed 3 times to make an update: no answer"
    assert then == f"the run goes on without cell {severed} (node-a), which is started again"
    assert isinstance(orders[-1], StartCell)
    assert orders[-1].cell == severed
    assert updates == [3 if cell == severed else 4 for cell in range(4)]


def test_a_cell_that_keeps_failing_stays_away(cluster: Make) -> None:
    """Each line names the host on which it was built, also where it does not get so far again."""
    made, said, orders = divided(cluster, works, works)
    for problem in ("rank 1 died", *["cell 1 has ended: status 1"] * 3):
        made.workers.cells.lose(1, problem)
    again = "; the run goes on without cell 1 (node-a), which is started again"
    *lost, last = said
    assert lost == ["rank 1 died" + again, *["cell 1 has ended: status 1" + again] * 2]
    assert last == "cell 1 has ended: status 1; cell 1 (node-a) has failed 4 times in a row and stays away"
    starts = [order for order in orders if isinstance(order, StartCell)]
    assert [(order.start, order.after, len(order.credentials)) for order in starts] == [
        (1, 0.0, 1),
        (2, 2.0, 1),
        (3, 8.0, 1),
        (4, 0.0, 0),
    ]
    assert made.workers.call(RefitEngine(0), step=3) == [empty(RefitEngine(0))]


def is_suspended(rank: FakeRank, call: Call) -> None: ...


def is_heard(rank: FakeRank, call: Call) -> Result:
    for _ in range(10):
        rank.send(Heartbeat(rank.rank, call.command.phase, call.step))
        time.sleep(0.1)
    return empty(call.command)


@pytest.mark.parametrize("cells", [1, 2])
def test_a_silent_rank_has_less_time_in_a_cell(cluster: Make, cells: int) -> None:
    """Without cells its silence would end the run, which `deadlines.heartbeat_timeout` limits."""
    made, lost = cluster(2, cells=cells, heartbeat_timeout=2.0), list[str]()
    made.workers.cells.configure(ResilienceConfig(cells=cells, cell_timeout=0.5), lambda order: None)
    made.workers.cells.show = lost.append
    made.add(0, is_heard)
    made.add(1, is_suspended)
    made.workers.wait_ready()
    began = time.monotonic()
    if cells == 2:
        assert len(made.workers.call(RefitEngine(0), step=0)) == 1
        assert time.monotonic() - began < 1.8
        assert "rank 1 (node-a, pid 1001) is silent" in lost[0]
    else:
        with pytest.raises(WorkerSilentError, match="is silent"):
            made.workers.call(RefitEngine(0), step=0)
        assert time.monotonic() - began > 1.5
