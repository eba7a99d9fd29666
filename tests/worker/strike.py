"""Hurts ranks of a run of cells in the middle of a command, so that a test need not be quick to do it.

The file that ``STRIKES`` names says where, as JSON of a list of :class:`Strike`. Each of them hits once. An interpreter
calls :func:`install` by a ``sitecustomize`` that is in its PYTHONPATH.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from miles_spmd.types.cell import KEYS
from tests.worker.launched import REPOSITORY


class Strike(msgspec.Struct, frozen=True):
    """``number`` goes to the process of ``rank``, in that ``start`` of its cell, in or after its ``time``-th
    ``command``, at the call of a function that has this number in it, or at the end where there are fewer calls; a step
    of the engine is a command ``EngineStep``, the transfer of a state ``SendState`` and ``ReceiveState``, and parts of
    an update are ``Exchange`` and ``Commit``. With ``seconds`` the thread sleeps instead, while the others of the
    process go on; a ``shell`` executes that command, and the thread goes on. ``start`` None: in the first one that
    begins after all strikes before it."""

    rank: int
    command: str
    time: int = 1
    call: int = 1
    start: int | None = 0
    number: int = signal.SIGKILL
    seconds: float = 0.0
    shell: str = ""


def write(folder: Path, strikes: Sequence[Strike]) -> dict[str, str]:
    """Return the variables of the environment of a run that is to be hurt like this."""
    hook, plan = folder / "hook", folder / "strikes.json"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("from tests.worker import strike\n\nstrike.install()\n")
    plan.write_bytes(msgspec.json.encode(strikes))
    return {"STRIKES": str(plan), "PYTHONPATH": f"{hook}:{REPOSITORY}"}


def struck(folder: Path) -> int:
    """Return how many strikes have hit."""
    return len(victims(folder))


def victims(folder: Path) -> list[int]:
    """Return the processes that strikes have hit, in the order of the strikes."""
    return [int(file.read_text()) for file in sorted(folder.glob("strikes.json.*"))]


def install() -> None:
    """Let this process, where it is a rank of a cell, hurt itself."""
    plan, keys = os.environ.get("STRIKES"), os.environ.get(KEYS)
    if plan is None or keys is None or "RANK" not in os.environ:
        return
    cell, start = map(int, Path(keys).stem.split("-")[1:])
    rank = cell * int(os.environ["WORLD_SIZE"]) + int(os.environ["RANK"])
    strikes = msgspec.json.decode(Path(plan).read_bytes(), type=list[Strike])
    before = struck(Path(plan).parent)
    own = {
        n: one
        for n, one in enumerate(strikes)
        if one.rank == rank and (one.start == start or (one.start is None and n == before))
    }
    times = Counter[str]()

    from miles_spmd.worker import main, service

    build, step = main.build, service.step

    def hit(number: int, strike: Strike) -> None:
        sys.setprofile(None)
        if own.pop(number, None) is not None:
            Path(f"{plan}.{number}").write_text(str(os.getpid()))
            if strike.shell:
                subprocess.run(strike.shell, shell=True, check=True)
            elif strike.seconds:
                time.sleep(strike.seconds)
            else:
                os.kill(os.getpid(), strike.number)

    def execute_struck(execute: Callable[..., Any], name: str, *arguments: Any, **named: Any) -> Any:
        times[name] += 1
        due = [(n, one) for n, one in own.items() if one.command == name and one.time <= times[name]]
        if not due:
            return execute(*arguments, **named)
        number, strike = due[0]
        left = strike.call

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal left
            left -= event == "call"
            if not left:
                hit(number, strike)

        sys.setprofile(count)
        try:
            return execute(*arguments, **named)
        finally:
            hit(number, strike)

    def build_struck(*arguments: Any) -> Any:
        worker = build(*arguments)
        from miles_spmd.training.cells.link import CellLink  # not before: imports Megatron
        from miles_spmd.training.cells.live_state import PeerTransport

        def replace(kind: type, method: str, name: str) -> None:
            function = getattr(kind, method)
            setattr(kind, method, lambda *args, **named: execute_struck(function, name, *args, **named))

        replace(PeerTransport, "send_checkpoint", "SendState")
        replace(PeerTransport, "recv_checkpoint", "ReceiveState")
        replace(CellLink, "exchange", "Exchange")
        replace(CellLink, "commit", "Commit")
        execute = worker.execute
        worker.execute = lambda command: execute_struck(execute, type(command).__name__, command)
        return worker

    main.build = build_struck  # type: ignore[assignment]
    service.step = lambda engine: execute_struck(step, "EngineStep", engine)
