"""What a GPU's driver says about it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class GpuHealth(msgspec.Struct, frozen=True):
    """One GPU at one time."""

    uuid: str
    temperature: int  # degrees Celsius; 0: unknown
    corrected: int  # memory errors since the start of the run that changed nothing
    uncorrected: int  # memory errors since the start of the run that destroyed data
    throttled: list[str] = []  # why its clocks are lower than they should be
    xids: list[int] = []  # errors that the driver reported since the last time

    def with_earlier(self, xids: Sequence[int]) -> GpuHealth:
        """Return the same with error reports that were read before and not passed on."""
        return msgspec.structs.replace(self, xids=[*xids, *self.xids])
