"""The place of a process among cells, each of which is a whole replica of the run's ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

from miles_spmd.types.variables import VariableError, text, whole

# environment of a cell's processes
CELL, LIGHTHOUSE, KEYS, HERE = "MILES_SPMD_CELL", "MILES_SPMD_LIGHTHOUSE", "MILES_SPMD_KEYS", "MILES_SPMD_CELLS_HERE"


@dataclass(frozen=True)
class Cell:
    """The cell ``number`` of ``cells``, which meet through the lighthouse at the address ``http://HOST:PORT``. ``keys``
    is the file that has the credentials of its ranks; each start of a cell has another one. ``here`` of the cells share
    this machine."""

    number: int
    cells: int
    lighthouse: str
    keys: str = ""
    here: int = 1

    @classmethod
    def from_environment(cls) -> Cell | None:
        """Return the cell that this process is started for, None where a run has none. Raises VariableError."""
        if CELL not in os.environ:
            return None
        number, _, cells = text(CELL).partition("/")
        if not (number.isdecimal() and cells.isdecimal() and int(number) < int(cells)):
            raise VariableError(f"{CELL} is {text(CELL)!r}, not the number of a cell and how many there are, as in 0/2")
        return cls(int(number), int(cells), text(LIGHTHOUSE), text(KEYS), whole(HERE, least=1))

    @property
    def host(self) -> str:
        """The name or address under which all cells reach the lighthouse."""
        return self.lighthouse.removeprefix("http://").rpartition(":")[0]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that :meth:`from_environment` reads."""
        place = {CELL: f"{self.number}/{self.cells}", HERE: str(self.here)}
        return place | {LIGHTHOUSE: self.lighthouse, KEYS: self.keys}
