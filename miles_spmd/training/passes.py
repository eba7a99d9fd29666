"""The forward passes of the command that a rank executes, and how all ranks leave it before the same one.

Ranks wait for each other in the collectives of a pass. So no rank may leave a command by itself: a side thread holds
every rank before its next pass and reports how many have begun, and the controller, which hears all of them, says
before which one they leave. Nothing of a command has an effect before its last pass, so that it is as if it had never
begun. This does not hold for pipeline stages, which send to each other beside their passes.
"""

from __future__ import annotations

import math
import threading


class AbandonedError(RuntimeError):
    """The command is left, on all ranks before the same forward pass."""


class ForwardPasses:
    """Counts passes in the main thread; a side thread may hold it before the next one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._total: int | None = None  # of the command; None: it has not begun
        self._limit = math.inf
        self._held = False

    def begin(self, total: int) -> None:
        """The command that begins has so many passes, the same number on all ranks."""
        with self._changed:
            self._begun, self._total = 0, total  # it may have to be left before its first pass already

    def enter(self) -> None:
        """Begin a pass. Raises AbandonedError where the command is to be left before it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held)
            if self._begun >= self._limit:
                raise AbandonedError
            self._begun += 1

    def end(self) -> None:
        """The command has ended."""
        with self._changed:
            self._begun, self._total, self._limit = 0, None, math.inf

    # --- for the side thread ---

    def hold(self) -> tuple[int, int | None]:
        """Begin no further pass. Returns how many have begun, and how many the command has."""
        with self._changed:
            self._held = True
            return self._begun, self._total

    def release(self, limit: int | None) -> None:
        """Go on, up to ``limit`` passes if it is given."""
        with self._changed:
            self._held, self._limit = False, math.inf if limit is None else limit
            self._changed.notify_all()


PASSES = ForwardPasses()  # of this process, which executes one command at a time
