"""Environments as users of TRL write them."""

from __future__ import annotations

import asyncio
import time
from typing import Any


class Counter:
    """Counts up to the row's number. A wrong call costs a tenth."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1

    def reset(self, **row: Any) -> str | None:
        self.row, self.count, self.reward = row, 0, 0.0
        return f" Count to {row['size']}."

    def up(self, by: int = 1) -> str:
        """Count further.

        Args:
            by: How far.
        """
        time.sleep(0.01)  # as a client of a server does
        self.count += by
        return f"now {self.count}"

    async def stop(self) -> str:
        """End the game."""
        await asyncio.sleep(0)
        self.reward = float(self.count == self.row["size"])
        return "over"

    def _private(self) -> None: ...

    def get_reward(self) -> float:
        return self.reward


class Silent:
    """Without a reward of its own, and without text."""

    def reset(self, **row: Any) -> None: ...

    def look(self) -> str:
        """Look around."""
        return "dark"

    def hang(self) -> str:
        """Takes long."""
        time.sleep(1)
        return ""


class Unbegun:
    def look(self) -> str:
        """Look around."""
        return ""


class Undocumented(Silent):
    def touch(self, what: str) -> str:
        return what
