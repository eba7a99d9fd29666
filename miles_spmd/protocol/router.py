"""The controller's end of the control plane: one ROUTER socket that admits only holders of a rank's key."""

from __future__ import annotations

import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Collection

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from miles_spmd.protocol.messages import Message, WireError, decode, encode
from miles_spmd.protocol.pipe import Credentials, make_keys

Peer = bytes  # a connection's routing id, chosen by our socket, so no client can claim another's
ANY_INTERFACE = "0.0.0.0"
LOOPBACK = "127.0.0.1"
IO_THREADS = 4  # one thread is too slow to encrypt a large batch for many ranks


def address_towards(host: str) -> str | None:
    """Return this machine's address on the interface by which it reaches ``host``, which may be this machine; None
    where it is unknown. A loopback address is one of every machine: it counts only where ``host`` is written as one,
    because a hosts file may give a machine's own name to it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return None
    loopback = host == "localhost" or host.startswith("127.")
    return address if loopback or not address.startswith("127.") else None


class PeerGoneError(ConnectionError):
    """The connection to which a message was addressed is closed."""


class Router:
    """Binds a free port. ``host`` is the name or address under which clients reach this machine; with the default, only
    processes of this machine can connect. ``credentials``, by rank, admit each of ``ranks`` ranks, and name the folder
    of their ``logs``; ``rank_of`` gives the rank whose key a connection has shown, and ``address`` is what it listens
    at."""

    def __init__(self, host: str = LOOPBACK, ranks: int = 1, logs: str = "") -> None:
        server_public, server_secret = make_keys()
        self._rank_of_key: dict[str, int] = {}
        self.rank_of: dict[Peer, int] = {}
        self.loses: Callable[[int], bool] = lambda rank: False  # whether a message to that rank is dropped
        self._context = zmq.Context(IO_THREADS)
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", self)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey = server_public.encode()
        self._socket.curve_secretkey = server_secret.encode()
        self._socket.router_mandatory = True  # sending to a closed connection is an error, not a silent drop
        self._socket.linger = 1000
        self._socket.monitor("inproc://connections", zmq.EVENT_DISCONNECTED)
        self._monitor = self._context.socket(zmq.PAIR)
        self._monitor.rcvhwm = 0  # a full queue would block libzmq's thread, so a flood of strangers must fit
        self._monitor.connect("inproc://connections")
        self.address = address_towards(host) or ANY_INTERFACE
        port = self._socket.bind_to_random_port(f"tcp://{self.address}")
        self._logs = logs
        self._endpoint, self._public = f"tcp://{host}:{port}", server_public
        self.credentials: list[Credentials] = []
        self.renew(range(ranks))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._wakes = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wakes, zmq.POLLIN)
        self._peer_of_descriptor: dict[int, Peer] = {}
        self._closed: set[Peer] = set()
        self._closings: deque[Peer] = deque()  # those of _closed that are not reported yet
        self._unknown: set[int] = set()  # descriptors of connections that closed before a message of theirs was read

    def renew(self, ranks: Collection[int]) -> None:
        """Give ``ranks`` new keys. Whoever has their old ones is not admitted any more, what such a connection still
        sends is dropped, and nobody hears of its end."""
        pairs = {rank: make_keys() for rank in sorted(ranks)}
        for rank, pair in pairs.items():
            self.credentials[rank : rank + 1] = [Credentials(self._endpoint, self._public, *pair, self._logs)]
        kept = {key: rank for key, rank in self._rank_of_key.items() if rank not in pairs}
        # replaced as a whole, because another thread reads it
        self._rank_of_key = kept | {public: rank for rank, (public, _) in pairs.items()}
        self.rank_of = {peer: rank for peer, rank in self.rank_of.items() if rank not in pairs}

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a client may connect. The authenticator calls this on its own thread for every client that has
        the server's public key."""
        return key.decode() in self._rank_of_key

    def wake(self) -> None:
        """End the :meth:`receive` that waits, or else the next that would: one with the timeout 0 leaves it to those
        behind it. Any thread may call this."""
        os.eventfd_write(self._wakes, 1)

    def send(self, message: Message, peers: list[Peer]) -> None:
        """Send the message, encoded once, to each of ``peers``. Raises PeerGoneError, after the others have it."""
        data, gone = encode(message), list[Peer]()
        for peer in peers:
            if self.loses(self.rank_of[peer]):
                continue
            try:
                if peer in self._closed:  # libzmq may still accept it: it handles the closing on another thread
                    raise zmq.ZMQError(zmq.EHOSTUNREACH)
                self._socket.send_multipart([peer, data], copy=False)
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                gone.append(peer)
        if gone:
            raise PeerGoneError(f"connection {gone[0].hex()} is closed")

    def receive(self, timeout: float) -> tuple[Peer, Message | WireError | None] | None:
        """Wait up to ``timeout`` seconds, without using the CPU, for the next event of an admitted peer.

        Returns (peer, message); (peer, WireError) for bytes that do not decode; (peer, None), once, when a peer's
        connection has closed and everything that it sent was read; None when the time is over, and after a
        :meth:`wake`. Clients without the run's key cause no event.
        """
        end = time.monotonic() + timeout
        while True:
            seconds = 0.0 if self._closings else max(0.0, end - time.monotonic())
            ready = dict(self._poller.poll(math.ceil(seconds * 1000)))
            # A message may have arrived after the poll, with its connection closed right behind it: the last message
            # of a peer has to be read before the event that the peer is gone.
            if self._socket in ready or self._socket.poll(0):
                if (event := self._read()) is not None:
                    return event
                continue
            if self._closings:
                if (closed := self._closings.popleft()) in self.rank_of:
                    return closed, None
            elif self._monitor in ready:
                self._take_closings()
            else:
                if self._wakes in ready and timeout > 0:
                    os.eventfd_read(self._wakes)
                return None

    def _read(self) -> tuple[Peer, Message | WireError] | None:
        """Return the next message and who sent it; None where its key was replaced."""
        peer, *frames = self._socket.recv_multipart(copy=False)
        self._remember(peer.bytes, int(peer.get(zmq.SRCFD)))
        rank = self._rank_of_key.get(str(peer.get("User-Id")))  # pyzmq's authenticator sets it to the key
        if rank is None:
            return None
        self.rank_of[peer.bytes] = rank
        try:
            if len(frames) != 1:
                raise WireError(f"a message of {len(frames)} frames instead of one")
            return peer.bytes, decode(frames[0].buffer)
        except WireError as error:
            return peer.bytes, error

    def _remember(self, peer: Peer, descriptor: int) -> None:
        """Remember the connection's file descriptor: events of closing carry it, and no routing id. The next connection
        may get the descriptor of one that has closed; libzmq reports the closing before, so what has been reported up
        to the first message of a connection is not about this one, unless it has closed as well."""
        if self._peer_of_descriptor.get(descriptor) == peer or peer in self._closed:
            return
        self._take_closings()
        if descriptor in self._unknown and not _is_connected(descriptor):
            self._close_peer(peer)
        else:
            self._peer_of_descriptor[descriptor] = peer
        self._unknown.discard(descriptor)

    def _take_closings(self) -> None:
        """Take all events of closing that have been reported."""
        while self._monitor.poll(0):
            descriptor = parse_monitor_message(self._monitor.recv_multipart())["value"]
            peer = self._peer_of_descriptor.pop(descriptor, None)
            if peer is None:  # a client that was not admitted, or whose first message is still to be read
                self._unknown.add(descriptor)
            else:
                self._close_peer(peer)

    def _close_peer(self, peer: Peer) -> None:
        self._closed.add(peer)
        self._closings.append(peer)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._authenticator.stop()
        self._context.term()
        os.close(self._wakes)

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_connected(descriptor: int) -> bool:
    """Return whether this file descriptor is one of a connection at present that its other end has not closed."""
    try:
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:  # there is nothing to read yet
        return True
    except OSError:
        return False
