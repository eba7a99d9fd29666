"""Who gets in, who does not, and what a controller hears of each. Real sockets, real keys."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import zmq

from miles_spmd.protocol.commands import RefitEngine, TrainStep
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Call, Heartbeat, WireError, encode
from miles_spmd.protocol.pipe import Credentials, make_keys
from miles_spmd.protocol.router import PeerGoneError, Router
from miles_spmd.types.phase import Phase
from miles_spmd.types.train_sequence import TrainSequence

HEARTBEAT = Heartbeat(rank=1, phase=Phase.TRAIN, step=3)
CALL = Call(1, 2, 60.0, RefitEngine(3))


@pytest.fixture
def router() -> Iterator[Router]:
    with Router(ranks=2) as router:
        yield router


def works_for(router: Router, dealer: Dealer) -> bool:
    """A message up and one down."""
    dealer.send(HEARTBEAT)
    event = router.receive(5)
    if event is None or event[1] != HEARTBEAT:
        return False
    router.send(CALL, [event[0]])
    return dealer.receive(5) == CALL


def port_of(router: Router) -> int:
    return int(router.credentials[1].endpoint.rpartition(":")[2])


def test_a_member_of_the_run_gets_in(router: Router) -> None:
    dealer = Dealer(router.credentials[1])
    assert works_for(router, dealer)
    dealer.close()


@pytest.fixture(params=["no key", "a key of its own", "the wrong server", "plain text", "no zmq", "http"])
def stranger(request: pytest.FixtureRequest, router: Router) -> Iterator[str]:
    """A client without the run's client key that has just tried to talk to ``router``."""
    context = zmq.Context()
    client = context.socket(zmq.DEALER)
    client.linger = 0
    raw: socket.socket | None = None
    server, keys = router.credentials[1].server_public, make_keys()
    if request.param == "a key of its own":
        client.curve_serverkey, client.curve_publickey, client.curve_secretkey = (k.encode() for k in (server, *keys))
    elif request.param == "the wrong server":
        mine = (make_keys()[0], router.credentials[1].client_public, router.credentials[1].client_secret)
        client.curve_serverkey, client.curve_publickey, client.curve_secretkey = (k.encode() for k in mine)
    elif request.param == "plain text":
        client.plain_username, client.plain_password = b"rank", b"1"
    elif request.param != "no key":
        raw = socket.create_connection(("127.0.0.1", port_of(router)))
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" if request.param == "http" else struct.pack("!64I", *range(64)))
    if raw is None:
        client.connect(router.credentials[1].endpoint)
        client.send(encode(HEARTBEAT))
    yield request.param
    if raw is not None:
        raw.close()
    client.close()
    context.term()


def test_a_stranger_gets_nothing_and_disturbs_nothing(router: Router, stranger: str) -> None:
    assert router.receive(0.3) is None
    dealer = Dealer(router.credentials[1])
    assert works_for(router, dealer)
    dealer.close()


def test_a_flood_of_strangers_disturbs_nothing(router: Router) -> None:
    """More closed connections than a queue of default size holds, while the controller does something else."""
    for _ in range(2300):
        with socket.create_connection(("127.0.0.1", port_of(router))) as stranger:
            stranger.sendall(b"\xff")
    dealer = Dealer(router.credentials[1])
    assert works_for(router, dealer)
    dealer.close()


def test_two_runs_on_one_host() -> None:
    with Router(ranks=2) as one, Router(ranks=2) as other:
        assert port_of(one) != port_of(other)
        lost = msgspec.structs.replace(one.credentials[1], endpoint=other.credentials[1].endpoint)
        dealers = [Dealer(credentials) for credentials in (lost, one.credentials[1], other.credentials[1])]
        dealers[0].send(HEARTBEAT)
        assert works_for(one, dealers[1])
        assert works_for(other, dealers[2])
        assert one.receive(0.2) is other.receive(0) is None
        for dealer in dealers:
            dealer.close()


def test_malformed_bytes_from_a_member_are_a_typed_error(router: Router) -> None:
    dealer = Dealer(router.credentials[1])
    dealer._socket.send(b"\x81\xa4type\xa8Shutdown")
    event = router.receive(5)
    assert event is not None
    assert isinstance(event[1], WireError)
    dealer._socket.send_multipart([encode(HEARTBEAT), b""])
    event = router.receive(5)
    assert event is not None
    assert "2 frames" in str(event[1])
    assert works_for(router, dealer)
    dealer.close()


def test_a_killed_process_is_noticed_at_once(router: Router) -> None:
    code = (
        "import sys, time, msgspec\n"
        "from miles_spmd.protocol.dealer import Dealer\n"
        "from miles_spmd.protocol.pipe import Credentials\n"
        "from miles_spmd.protocol.messages import Heartbeat\n"
        "from miles_spmd.types.phase import Phase\n"
        "dealer = Dealer(msgspec.json.decode(sys.argv[1], type=Credentials))\n"
        "dealer.send(Heartbeat(rank=1, phase=Phase.TRAIN, step=3))\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, msgspec.json.encode(router.credentials[1]).decode()])
    event = router.receive(30)
    assert event is not None
    peer = event[0]
    killed = time.monotonic()
    process.kill()
    process.wait()
    assert router.receive(5) == (peer, None)
    assert time.monotonic() - killed < 1
    with pytest.raises(PeerGoneError):
        router.send(CALL, [peer])


def client_of(router: Router, rank: int) -> zmq.Socket[bytes]:
    """A connection with this rank's key, which has sent something."""
    client: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    keys = router.credentials[rank]
    client.curve_serverkey, client.curve_publickey = keys.server_public.encode(), keys.client_public.encode()
    client.curve_secretkey, client.linger = keys.client_secret.encode(), 1000
    client.connect(keys.endpoint)
    client.send(encode(Heartbeat(rank=rank, phase=Phase.TRAIN, step=3)))
    return client


def wait_for_closing(router: Router) -> None:
    """The closing of a connection has been reported, and nobody has looked yet."""
    assert router._monitor.poll(5000)
    time.sleep(0.05)  # the descriptor is closed right after it


def test_the_end_of_a_connection_is_not_that_of_the_next_one_with_its_descriptor(router: Router) -> None:
    """A rank that is started again connects while the controller has something else to do than to look at the end of
    its first connection. The new one has the number of the old one's file descriptor."""
    first = client_of(router, 0)
    event = router.receive(5)
    assert event is not None
    old, (descriptor,) = event[0], router._peer_of_descriptor
    first.close()
    wait_for_closing(router)
    second = client_of(router, 1)
    assert router._socket.poll(5000)
    event = router.receive(5)
    assert event is not None
    assert isinstance(event[1], Heartbeat)
    new = event[0]
    assert router._peer_of_descriptor == {descriptor: new}, "the test needs the same descriptor"
    assert router.receive(5) == (old, None)
    assert router.receive(0.2) is None
    router.send(CALL, [new])
    second.close()
    assert router.receive(5) == (new, None)


@pytest.mark.parametrize("before", [False, True], ids=["", "after another one with its descriptor"])
def test_a_connection_that_closed_before_its_message_was_read(router: Router, before: bool) -> None:
    if before:
        client_of(router, 1).close()
        wait_for_closing(router)
        event = router.receive(5)
        assert event is not None
        assert router.receive(5) == (event[0], None)
    client_of(router, 0).close()
    wait_for_closing(router)
    event = router.receive(5)
    assert event is not None
    assert isinstance(event[1], Heartbeat)
    assert router.receive(5) == (event[0], None)
    assert router.receive(0.2) is None


def test_a_stranger_had_the_descriptor_before(router: Router) -> None:
    socket.create_connection(("127.0.0.1", port_of(router))).close()
    time.sleep(0.2)
    client = client_of(router, 0)
    assert router._socket.poll(5000)
    event = router.receive(5)
    assert event is not None
    assert isinstance(event[1], Heartbeat)
    assert router.receive(0.2) is None
    client.close()
    assert router.receive(5) == (event[0], None)


def test_a_dealer_learns_that_the_controller_is_gone() -> None:
    with Router(ranks=2) as router:
        dealer = Dealer(router.credentials[1])
        assert works_for(router, dealer)
        assert not dealer.disconnections.poll(0)
    assert dealer.disconnections.poll(5000)
    dealer.close()


def test_arrays_of_a_large_batch_arrive(router: Router) -> None:
    sequence = TrainSequence(np.arange(2**20, dtype=np.int32), np.ones(2**20, np.float32))
    dealer = Dealer(router.credentials[1])
    assert works_for(router, dealer)
    dealer.send(HEARTBEAT)
    event = router.receive(5)
    assert event is not None
    router.send(Call(1, 1, 60.0, TrainStep([[sequence] * 4])), [event[0]])
    call = dealer.receive(30)
    assert isinstance(call, Call)
    assert isinstance(call.command, TrainStep)
    assert len(call.command.micro_batches[0]) == 4
    assert np.array_equal(call.command.micro_batches[0][3].tokens, sequence.tokens)
    dealer.close()


def test_secrets_do_not_show(router: Router) -> None:
    assert router.credentials[1].client_secret not in repr(router.credentials[1])
    assert isinstance(router.credentials[1], Credentials)


def test_who_looks_does_not_take_the_wake_of_who_waits(router: Router) -> None:
    began = time.monotonic()
    router.wake()
    assert router.receive(0) is None
    assert router.receive(30) is None
    assert time.monotonic() - began < 10
    assert router.receive(0.2) is None  # one wake ends one wait
    assert time.monotonic() - began > 0.2
