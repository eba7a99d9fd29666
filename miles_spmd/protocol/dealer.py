"""A worker's end of the control plane: one DEALER socket, used by one thread."""

from __future__ import annotations

import contextlib
import math

import zmq

from miles_spmd.protocol.messages import Message, decode, encode
from miles_spmd.protocol.pipe import Credentials


class Dealer:
    """Connects to a run's controller. When the controller's machine sends nothing for ``silence`` seconds the
    connection counts as closed even without a packet that closes it (ZMTP heartbeats, which libzmq's thread sends)."""

    def __init__(self, credentials: Credentials, silence: float = 60.0) -> None:
        self._context = zmq.Context()  # its own, so that closing waits for what this thread has sent
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.curve_serverkey = credentials.server_public.encode()
        self._socket.curve_publickey = credentials.client_public.encode()
        self._socket.curve_secretkey = credentials.client_secret.encode()
        self._socket.heartbeat_ivl = int(silence * 1000 / 4)
        self._socket.heartbeat_timeout = int(silence * 1000)
        self._socket.linger = 1000
        self.disconnections = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)  # readable once it happened
        self._socket.connect(credentials.endpoint)

    def send(self, message: Message) -> None:
        """Queue the message. Blocks only while a thousand messages are unsent."""
        self._socket.send(encode(message), copy=False)

    def try_send(self, message: Message) -> None:
        """Queue the message, or drop it where :meth:`send` would block."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(message), zmq.NOBLOCK, copy=False)

    def receive(self, timeout: float | None = None) -> Message | None:
        """Return the next message, or None after ``timeout`` seconds without one (None: wait without limit). With
        ``timeout=0`` it costs microseconds. Raises WireError on bytes that do not decode to a message."""
        ready = self._socket.poll(None if timeout is None else math.ceil(timeout * 1000))
        return decode(self._socket.recv()) if ready else None

    @property
    def incoming(self) -> zmq.Socket[bytes]:
        """For a poller: readable where :meth:`receive` would not wait."""
        return self._socket

    def close(self) -> None:
        """Close the connection; what was sent has up to a second to leave."""
        self._socket.disable_monitor()
        self.disconnections.close(0)
        self._socket.close()
        self._context.term()
