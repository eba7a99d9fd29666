"""Cells on GPUs of their own, which exchange gradients over NCCL: the run of one world of ranks, also when one dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.quickstart.__main__ import GRPO
from miles_spmd.training.cells.group import Group
from tests.gpu import machine
from tests.gpu.test_grpo import grpo, grpo_settings, run_settings
from tests.ranks import free_port

EXCHANGE = 6.0  # seconds that one exchange may take

STEPS = 110  # so many that the lost cell is back before the last one
EXACT = ["determinism.deterministic=true", "train.reduction_leaves=8"]
CELLS = ["resilience.cells=2", "resilience.standby=true", "--faults=kill:rank1@train.5"]


@machine.needs(2)
def test_a_cell_dies_and_comes_back(warm: Path) -> None:
    grpo(warm, "whole", 2, STEPS, *EXACT)
    command = [sys.executable, "-m", "miles_spmd", "chaos", str(GRPO), "--nproc-per-node=1"]
    settings = [*run_settings(warm, "cells"), *grpo_settings(warm, STEPS)]
    done = subprocess.run(
        [*command, *settings, *EXACT, *CELLS], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    machine.MEASURED += done.stdout.splitlines()[-4:]
    assert "cell 1 takes part again" in (warm / "cells-chaos" / "faults" / "start-1.log").read_text()
    comparison = compare(verify(warm / "cells-chaos"), verify(warm / "whole"))
    assert comparison.equal, comparison.difference
    assert len(comparison.steps) == STEPS


@machine.needs(2)
def test_a_cell_ends_while_sums_are_on_their_way() -> None:
    """The other one waits no longer, its GPU computes, and it exchanges sums with the cell that comes next."""
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    ends = [signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL]
    said, saying = spawn.Pipe(duplex=False)
    stays = spawn.Process(target=_stays, args=(port, len(ends), saying), daemon=True)
    stays.start()
    seconds = []
    for meeting, by in enumerate(ends):
        gone, going = spawn.Pipe(duplex=False)
        leaves = spawn.Process(target=_leaves, args=(port, meeting, by, going), daemon=True)
        leaves.start()
        assert said.poll(100), f"meeting {meeting} goes on"
        noticed, why = said.recv()
        seconds.append(noticed - gone.recv())
        assert why.startswith("sums were not" if by == signal.SIGSTOP else "the connection to another cell"), why
        leaves.kill()
    stays.join(30)
    assert stays.exitcode == 0
    machine.measured(
        "seconds until a cell knows that the other has ended",
        dict(zip(["killed", "suspended", "killed again"], seconds, strict=True)),
    )
    assert seconds[0] < 1
    assert seconds[1] < EXCHANGE + 1
    assert seconds[2] < 1


def _stays(port: int, meetings: int, said: Connection) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    torch.cuda.set_device(0)
    group = Group(EXCHANGE, silence=2.0)
    for meeting in range(meetings):
        try:
            _exchange(group, port, meeting, 0)
        except ConnectionError as error:
            said.send((time.monotonic(), str(error)))
        group.abort()
        assert torch.ones(1000, device="cuda").sum() == 1000
    del store


def _leaves(port: int, meeting: int, by: signal.Signals, going: Connection) -> None:
    def end() -> None:
        going.send(time.monotonic())
        os.kill(os.getpid(), by)

    torch.cuda.set_device(1)
    threading.Timer(6.0, end).start()
    _exchange(Group(EXCHANGE, silence=2.0), port, meeting, 1)


def _exchange(group: Group, port: int, meeting: int, rank: int) -> None:
    """Without an end."""
    group.configure(f"127.0.0.1:{port}/{meeting}", str(rank), rank, 2)
    assert group.device.type == "cuda"
    mine = torch.full((1 << 26,), 1.0 + rank, device="cuda")
    whole = torch.empty(2, 1 << 26, device="cuda")
    while True:
        with group.watched():
            group.all_gather(whole, mine)
        assert whole[:, -1].tolist() == [1.0, 2.0]
