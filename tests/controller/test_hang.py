"""What the controller makes of the reports of ranks that hang."""

from __future__ import annotations

from miles_spmd.controller.cluster.hang import describe, ranks
from miles_spmd.protocol.messages import Collective, GroupRecord, Overdue


def entered(
    number: int, operation: str = "all_reduce", *, done: bool = False, tensors: str = "Float [7]"
) -> Collective:
    return Collective(number, operation, tensors, 12.0, done)


def group(name: str, members: list[int], *collectives: Collective) -> GroupRecord:
    return GroupRecord(name, "", members, list(collectives))


def report(
    rank: int, *groups: GroupRecord, frames: tuple[str, ...] = ("wait (c10d.py:1)", "step (trainer.py:2)")
) -> Overdue:
    return Overdue(rank, list(frames), list(groups))


def lines(*reports: Overdue, late: list[int] | None = None) -> list[str]:
    by_rank = {one.rank: one for one in reports}
    return describe(by_rank, late or sorted(by_rank), lambda rank: "idle after train, step 3")


def test_the_rank_that_waits_for_nobody_comes_first() -> None:
    """Rank 0 waits for rank 1 in one group, rank 1 for rank 3 in another: rank 3 is the cause."""
    data, model = [0, 1], [1, 3]
    found = lines(
        report(0, group("a", data, entered(4, done=True), entered(5))),
        report(1, group("a", data, entered(4, done=True)), group("b", model, entered(9, "all_gather"))),
        report(3, group("b", model, entered(8, "all_gather", done=True)), frames=("sleep (plugin.py:7)",)),
    )
    assert found == [
        "rank 1 in all_gather (Float [7]) for 12.0 s or more, number 9 of group b (ranks 1, 3); not entered by rank 3",
        "rank 0 in all_reduce (Float [7]) for 12.0 s or more, number 5 of group a (ranks 0, 1); not entered by rank 1",
        "rank 3 in sleep (plugin.py:7)",
        "ranks 0, 1 in wait (c10d.py:1) < step (trainer.py:2)",
    ]


def test_a_rank_that_left_without_the_collective_is_named() -> None:
    found = lines(report(0, group("a", [0, 1], entered(5))), late=[0])
    assert found[0].endswith("not entered by rank 1")
    assert found[1] == "rank 1 is not late: idle after train, step 3"


def test_different_collectives_are_found_also_after_one_rank_has_left_its_own() -> None:
    found = lines(
        report(0, group("a", [0, 1], entered(5, "broadcast"))),
        report(1, group("a", [0, 1], entered(5, "all_reduce", done=True), entered(6, "all_reduce"))),
    )
    assert found[0] == (
        "ranks call different collectives as number 5 of group a (ranks 0, 1): rank 0 broadcast (Float [7]); "
        "rank 1 all_reduce (Float [7])"
    )


def test_one_group_name_on_two_sides_of_a_run_is_two_groups() -> None:
    found = lines(
        report(0, group("1", [0, 1], entered(5))),
        report(1, group("1", [0, 1], entered(5))),
        report(2, group("1", [2, 3], entered(7, done=True))),
        report(3, group("1", [2, 3], entered(7, done=True))),
    )
    assert found[0] == "ranks 0, 1 in all_reduce (Float [7]) for 12.0 s or more, number 5 of group 1 (ranks 0, 1)"
    assert len(found) == 2


def test_messages_between_two_ranks_are_named_and_count_as_waiting() -> None:
    pipeline = GroupRecord("p", "PIPELINE", [0, 1], [], [entered(3, "recv 0<-1")])
    found = lines(
        report(0, pipeline, group("a", [0, 2], entered(1, done=True))),
        report(1, group("b", [1, 2], entered(2))),
        report(2, group("b", [1, 2], entered(1, done=True)), group("a", [0, 2], entered(1, done=True), entered(2))),
    )
    assert found[:3] == [
        "rank 2 in all_reduce (Float [7]) for 12.0 s or more, number 2 of group a (ranks 0, 2); not entered by rank 0",
        "rank 1 in all_reduce (Float [7]) for 12.0 s or more, number 2 of group b (ranks 1, 2); not entered by rank 2",
        "rank 0 in recv 0<-1 (Float [7]) for 12.0 s, of PIPELINE (ranks 0, 1)",
    ]


def test_a_rank_whose_record_could_not_be_read_is_not_accused() -> None:
    found = lines(
        report(0, group("a", [0, 1, 2, 3], entered(5))), report(1), report(3, group("b", [3])), late=[0, 1, 2, 3]
    )
    assert found[0].endswith("(ranks 0-3); not entered by rank 3; nothing is recorded of ranks 1, 2")


def test_without_reports_nothing_is_said() -> None:
    assert describe({}, [0, 1], str) == []


def test_ranks_are_listed_shortly() -> None:
    assert ranks([3]) == "rank 3"
    assert ranks([5, 0, 4, 6, 1, 9]) == "ranks 0, 1, 4-6, 9"
