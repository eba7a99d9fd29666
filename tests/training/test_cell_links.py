"""Connections between cells whose packets are dropped, in a network namespace of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.forked import REPOSITORY

SILENCE, EXCHANGE = 2.0, 30.0  # seconds
GATHERS = f"""
import os, subprocess, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from miles_spmd.training.cells.link import Group, Limits, _gather

rank = int(not os.fork())
if rank == 0:
    store = dist.TCPStore("127.0.0.1", 29500, is_master=True, wait_for_workers=False)
group = Group(Limits({EXCHANGE}, {EXCHANGE}, {EXCHANGE}, 0.1, {SILENCE}))
group.configure("127.0.0.1:29500/group", str(rank), rank, 2)
mine = torch.ones(1 << 20)
_gather(group, 2, mine)
time.sleep(1.5 * {SILENCE})  # without a word, and with packets that arrive
_gather(group, 2, mine)
if rank == 1:
    time.sleep(3 * {EXCHANGE})
subprocess.run(["iptables", "-A", "INPUT", "-j", "DROP"], check=True)
began = time.monotonic()
try:
    _gather(group, 2, mine)
except RuntimeError as error:
    print(time.monotonic() - began)
"""


def _missing() -> list[str]:
    lacking = [name for name in ("unshare", "ip", "iptables") if shutil.which(name) is None]
    refused = lacking or subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode
    return lacking + ["network namespaces"] * bool(refused and not lacking)


@pytest.mark.slow
@pytest.mark.skipif(bool(_missing()), reason=f"packets cannot be dropped here without {', '.join(_missing())}")
def test_a_connection_ends_when_packets_do_not_arrive() -> None:
    """After the seconds that a cell may be silent, not after those that an exchange may take."""
    inside = f'ip link set lo up && exec {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", inside, GATHERS],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert SILENCE - 1 < float(done.stdout) < SILENCE + 3
