"""The folder through which `miles-spmd chaos` and the controller of its run speak: which faults are to strike, and
which have struck.

A line about a strike is written before the strike, so that each strikes once, however the run ends by it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from miles_spmd.faults.fault import Fault

VARIABLE = "MILES_SPMD_FAULTS"  # environment of a run: the folder; without it nothing is injected
FAULTS_FILE, STRIKES_FILE = "faults.json", "strikes.jsonl"


class Strike(msgspec.Struct, frozen=True):
    """``fault`` is the number of the fault in the list, ``process`` and ``pids`` whom it struck, ``time`` Unix
    seconds, ``moment`` when it was within the phase, in words."""

    fault: int
    process: str
    pids: list[int]
    time: float
    moment: str


class Plan:
    """The faults in ``folder``, and their strikes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_environment(cls) -> Plan | None:
        """Return the plan of the run that this process belongs to; None: nothing is to be injected."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    def write(self, faults: Sequence[Fault]) -> None:
        """Begin with these faults, none of which has struck. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / STRIKES_FILE).unlink(missing_ok=True)
        (self._folder / FAULTS_FILE).write_bytes(msgspec.json.encode(faults))

    def faults(self) -> list[Fault]:
        return msgspec.json.decode((self._folder / FAULTS_FILE).read_bytes(), type=list[Fault])

    def strikes(self) -> list[Strike]:
        """Return the strikes so far, in order."""
        file = self._folder / STRIKES_FILE
        return [
            msgspec.json.decode(line, type=Strike)
            for line in (file.read_bytes() if file.exists() else b"").splitlines()
        ]

    def strike(self, strike: Strike) -> None:
        """Note what is about to happen. One write of a whole line, which a killed process leaves behind."""
        descriptor = os.open(self._folder / STRIKES_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, msgspec.json.encode(strike) + b"\n")
        finally:
            os.close(descriptor)
