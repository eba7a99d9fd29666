"""Connections between cells that end, and those whose packets are dropped, in a network namespace of their own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from miles_spmd.training.cells.group import Watch
from tests.forked import REPOSITORY

SILENCE, EXCHANGE = 2.0, 30.0  # seconds
GATHERS = f"""
import os, subprocess, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from miles_spmd.training.cells.group import Group

rank = int(not os.fork())
if rank == 0:
    store = dist.TCPStore("127.0.0.1", 29500, is_master=True, wait_for_workers=False)
group = Group({EXCHANGE}, {SILENCE})
group.configure("127.0.0.1:29500/group", str(rank), rank, 2)
mine = torch.ones(1 << 20)
group.gather(mine, 2)
time.sleep(1.5 * {SILENCE})  # without a word, and with packets that arrive
group.gather(mine, 2)
if rank == 1:
    time.sleep(3 * {EXCHANGE})
subprocess.run(["iptables", "-A", "INPUT", "-j", "DROP"], check=True)
began = time.monotonic()
try:
    group.gather(mine, 2)
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


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as near,
        server.accept()[0] as far,
    ):
        yield near, far


def test_a_watch_ends_what_waits_for_a_cell_that_has_left() -> None:
    with connected() as (one, _), connected() as (near, far):
        ended = threading.Event()
        watch = Watch({(each.getsockname(), each.getpeername()) for each in (one, near)}, 60.0, ended.set)
        far.close()
        assert ended.wait(10)
        watch.close()
        assert "connection to another cell ended" in watch.reason


def test_a_watch_begins_when_a_cell_has_left() -> None:
    with connected() as (near, _):
        ends = near.getsockname(), near.getpeername()
    ended = threading.Event()
    watch = Watch({ends}, 60.0, ended.set)
    watch.close()
    assert ended.is_set()
    assert "had ended" in watch.reason


def test_a_watch_knows_when_the_time_is_up() -> None:
    with connected() as (near, _):
        ended = threading.Event()
        watch = Watch({(near.getsockname(), near.getpeername())}, 0.05, ended.set)
        assert ended.wait(10)
        watch.close()
        assert watch.reason == "sums were not exchanged within 0.05 s"


def test_a_watch_that_is_closed_ends_nothing() -> None:
    with connected() as (near, far):
        ended = threading.Event()
        watch = Watch({(near.getsockname(), near.getpeername())}, 60.0, ended.set)
        near.sendall(b"words that nobody reads")
        watch.close()
        assert not ended.is_set()
        assert watch.reason == ""
        assert far.recv(5) == b"words"  # both ends are open as before
