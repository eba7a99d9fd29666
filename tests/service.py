"""A rank's service in the long-lived ranks of tests/ranks.py, whose processes go on when a run has ended or failed."""

from __future__ import annotations

from collections.abc import Callable

from miles_spmd.protocol.commands import Stop
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Call, Message
from miles_spmd.protocol.pipe import Credentials
from miles_spmd.types.phase import Phase


class EndingDealer(Dealer):
    """Receives Stop as soon as ``ended`` returns True, whether the controller has sent it or not."""

    def __init__(self, credentials: Credentials, ended: Callable[[], bool]) -> None:
        super().__init__(credentials)
        self._ended = ended

    def receive(self, timeout: float | None = None) -> Message | None:
        while (message := super().receive(0.05 if timeout is None else timeout)) is None and timeout is None:
            if self._ended():
                return Call(0, 0, 0.0, Stop())
        return message


class Unwatched:
    """A real watchdog would take over this process's signals."""

    def enter(self, phase: Phase, step: int, seconds: float = 0.0) -> None: ...

    def progress(self, detail: str) -> None: ...

    def begin_engine_step(self, seconds: float) -> None: ...

    def end_engine_step(self) -> None: ...
