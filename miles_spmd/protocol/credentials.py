"""What admits a rank to a run: the controller's address and CURVE keys."""

from __future__ import annotations

import msgspec
import zmq


class Credentials(msgspec.Struct, frozen=True):
    """Of one rank: every rank has a key pair of its own, and whoever holds it speaks for this rank and no other. Keys
    are Z85 text. They reach the ranks in a file that only the run's user can read (``worker/meeting.py``).
    """

    endpoint: str  # "tcp://host:port"
    server_public: str
    client_public: str
    client_secret: str

    def __repr__(self) -> str:
        return f"Credentials({self.endpoint})"  # never a secret in a log


def make_keys() -> tuple[str, str]:
    """Return a new CURVE key pair (public, secret)."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()
