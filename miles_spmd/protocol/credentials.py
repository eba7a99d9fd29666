"""What gets a client into a run: where the controller listens, and the run's CURVE keys."""

from __future__ import annotations

import msgspec
import zmq


class Credentials(msgspec.Struct, frozen=True):
    """Handed to the workers through the run's TCPStore; whoever holds it is a member of the run. Keys are Z85 text.

    All clients share one key pair: the line runs between members of a run and everyone else, not between ranks.
    """

    endpoint: str  # "tcp://host:port"
    server_public: str
    client_public: str
    client_secret: str = ""  # empty in what a run shows to the outside

    def __repr__(self) -> str:
        return f"Credentials({self.endpoint})"  # never a secret in a log


def make_keys() -> tuple[str, str]:
    """A fresh CURVE pair (public, secret)."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()
