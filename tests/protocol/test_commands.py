"""Every command is declared once and completely: receivers, deadline, result, and a handler on the worker's side."""

from __future__ import annotations

import typing

import msgspec
import pytest

from miles_spmd.config import DeadlinesConfig
from miles_spmd.controller.cluster.rank_table import RankTable
from miles_spmd.platform import cpu
from miles_spmd.protocol.commands import COMMANDS, AbortRequests, Command, EndGenerate, Receivers, Stop, Submit
from miles_spmd.protocol.messages import EngineRank, Reply, decode, encode
from miles_spmd.protocol.results import Result
from miles_spmd.types.engine_group import JUDGE
from tests.controller.ranks import EMPTY, info_of

FEED = {Submit, AbortRequests, EndGenerate}  # part of a rollout, handled by miles_spmd.worker.service


def test_all_commands_are_found() -> None:
    assert len(COMMANDS) == 21
    assert set(COMMANDS) > FEED


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_command_is_declared_completely(kind: type[Command]) -> None:
    assert isinstance(kind.receivers, Receivers)
    assert getattr(DeadlinesConfig(), kind.phase.deadline) > 0
    assert kind.__doc__
    assert kind.has_reply() == (kind not in FEED)


@pytest.mark.parametrize("kind", [kind for kind in COMMANDS if kind.has_reply()])
def test_its_result_survives_the_wire(kind: type[Command]) -> None:
    result_type = kind.result_type()
    assert issubclass(result_type, Result)
    reply = decode(encode(Reply(1, 0, "host", EMPTY[result_type])))
    assert isinstance(reply, Reply)
    assert type(reply.result) is result_type


def test_it_has_a_handler() -> None:
    """And the handler returns what the command declares. Stop ends the loop that calls the handlers."""
    cpu.install()  # whichever test of this process is the first to import Megatron
    from miles_spmd.worker.worker import Worker

    handlers = Worker.__dict__["execute"].dispatcher.registry
    assert set(handlers) - {object} == set(COMMANDS) - FEED - {Stop}
    for kind, handler in handlers.items():
        if kind is not object:
            assert typing.get_type_hints(handler)["return"] is kind.result_type(), kind


def test_every_kind_of_receiver_has_ranks() -> None:
    table = RankTable(4)
    for rank in (0, 1, 2, 3):
        table.states[rank].info = info_of(rank, 4, engine_size=2)
    assert table.receivers(Receivers.LEADERS) == [0, 2]
    for kind in set(Receivers) - {Receivers.LEADERS}:
        assert table.receivers(kind) == [0, 1, 2, 3]


def test_a_command_is_for_one_group_of_engines() -> None:
    table = RankTable(4)
    for rank in (0, 1):
        table.states[rank].info = info_of(rank, 2)
    for rank in (2, 3):
        own = EngineRank(0, leader=rank == 2)
        table.states[rank].info = msgspec.structs.replace(info_of(rank, 4), trainer=None, engine=own, group=JUDGE)
    of_policy = {Receivers.LEADERS: [0, 1], Receivers.ALL: [0, 1, 2, 3]}
    of_judge = {Receivers.LEADERS: [2], Receivers.TRAINERS: [], Receivers.ALL: [0, 1, 2, 3]}
    for kind in Receivers:
        assert table.receivers(kind) == of_policy.get(kind, [0, 1])
        assert table.receivers(kind, group=JUDGE) == of_judge.get(kind, [2, 3])
