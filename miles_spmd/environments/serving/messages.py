"""What the process that serves HTTP and the run say to each other. Requests and outputs are those of the engines."""

from __future__ import annotations

from typing import Literal

import msgspec

from miles_spmd.types.request import Output, Request


class Listening(msgspec.Struct, frozen=True, tag=True):
    """The process serves at ``url``."""

    url: str


class Problem(msgspec.Struct, frozen=True, tag=True):
    """The process cannot serve, or has ended."""

    text: str


class Asked(msgspec.Struct, frozen=True, tag=True):
    """What the policy is asked for; rids are as engines take them, ``conversation.number``."""

    requests: list[Request]


class Left(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this request any more."""

    rid: str


class Load(msgspec.Struct, frozen=True, tag=True):
    """Give the engines the weights in the folder ``path`` as ``version``: once what runs has ended (``wait``), while it
    goes on (``continue``), or after it was stopped (``abort``)."""

    path: str
    version: int
    running: Literal["wait", "continue", "abort"] = "wait"


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What the policy has sampled; an output with the reason ABORT is not complete."""

    outputs: list[Output]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The reply to :class:`Load`. ``problem``: why the engines have kept their weights."""

    problem: str = ""


class Ending(msgspec.Struct, frozen=True, tag=True):
    """The run ends: tell the clients, and end."""


FromServer = Listening | Problem | Asked | Left | Load
ToServer = Outputs | Loaded | Ending
