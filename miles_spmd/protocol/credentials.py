"""What admits a client to a run: the controller's address and the run's CURVE keys."""

from __future__ import annotations

import msgspec
import zmq


class Credentials(msgspec.Struct, frozen=True):
    """Handed to the workers through the run's TCPStore; whoever holds them is a member of the run. Keys are Z85 text.

    All clients share one key pair: the keys separate members of a run from everyone else, not rank from rank.
    """

    endpoint: str  # "tcp://host:port"
    server_public: str
    client_public: str
    client_secret: str = ""  # empty in what a run publishes

    def __repr__(self) -> str:
        return f"Credentials({self.endpoint})"  # never a secret in a log


def make_keys() -> tuple[str, str]:
    """Return a new CURVE key pair (public, secret)."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()
