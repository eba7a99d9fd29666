"""Programs that use up what they can: they end, leave nothing behind, and do not harm others."""

from __future__ import annotations

import subprocess
import threading
import time
import uuid

import psutil
import pytest

from miles_spmd.sandbox.sandbox import Limits, Problem, Sandbox


def left_over(mark: str) -> list[str]:
    """Return the processes whose command line has ``mark``, as soon as there are none or after seconds."""
    end = time.monotonic() + 5
    while True:
        lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        found = [line for line in lines if mark in line]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.02)


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(100)",
    "ignores SIGTERM": "import signal, time\nfor n in (1, 2, 3, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(100)",
    "closes its output": "import os, time\nfor n in (0, 1, 2): os.close(n)\ntime.sleep(100)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "prints a little": "import time\nwhile True: print('x', flush=True); time.sleep(0.01)",
    "threads": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(100,)).start()
    except RuntimeError: pass""",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_programs_are_killed(hasty: Sandbox, name: str, mark: str) -> None:
    start = time.monotonic()
    outcome = hasty.run(ENDLESS[name], arguments=[mark])
    assert (outcome.problem, outcome.status) == (Problem.TIME, None)
    assert 2 <= time.monotonic() - start < 20
    assert not left_over(mark)


def test_a_fork_bomb_has_few_processes(hasty: Sandbox, mark: str) -> None:
    """Counted outside, while the host goes on starting processes."""
    most = 0
    running = threading.Event()

    def count() -> None:
        nonlocal most
        while not running.is_set():
            most = max(most, sum(mark in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])))
            assert subprocess.run(["true"], check=False).returncode == 0

    counter = threading.Thread(target=count)
    counter.start()
    try:
        assert hasty.run(ENDLESS["fork bomb"], arguments=[mark]).problem is Problem.TIME
    finally:
        running.set()
        counter.join()
    wrappers = 2  # bwrap on the host and its init in the sandbox have the arguments in their command lines, too
    assert 4 < most <= 12 + wrappers


def test_children_do_not_outlive_the_program(hasty: Sandbox, mark: str) -> None:
    program = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for n in (0, 1, 2): os.close(n)
        time.sleep(100)
    os._exit(0)
print("done")
"""
    outcome = hasty.run(program, arguments=[mark])
    assert (outcome.stdout, outcome.problem) == ("done\n", Problem.OK)
    assert outcome.seconds < 2
    assert not left_over(mark)


def test_cpu_time_of_a_process_is_limited() -> None:
    outcome = Sandbox(Limits(seconds=20, cpu_seconds=1)).run("while True: pass")
    assert outcome.problem is Problem.TIME
    assert outcome.seconds < 10


@pytest.mark.parametrize("size", ["2**28", "2**40"])
def test_memory_is_limited(hasty: Sandbox, size: str) -> None:
    outcome = hasty.run(f"bytearray({size})")
    assert (outcome.problem, outcome.status) == (Problem.MEMORY, 1)
    assert hasty.run("bytearray(2**25)").problem is Problem.OK


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_limited(hasty: Sandbox, stream: str) -> None:
    outcome = hasty.run(f"import sys\nwhile True: sys.{stream}.write('x' * 999)")
    assert (outcome.problem, outcome.status) == (Problem.OUTPUT, None)
    assert getattr(outcome, stream) == "x" * 10_000
    assert Sandbox(Limits(output_bytes=1)).run("print('')").problem is Problem.OK
    exact = hasty.run(f"import sys; sys.{stream}.write('x' * 10_000)")
    assert (exact.problem, len(getattr(exact, stream))) == (Problem.OK, 10_000)


def test_files_are_limited(hasty: Sandbox) -> None:
    """Each by itself, all of them together, and in every place that can be written."""
    program = """
import errno, os
def fill(path):
    size = 0
    try:
        with open(path, "wb", buffering=0) as file:
            while True: size += file.write(bytes(65536))
    except OSError as error:
        return size, errno.errorcode[error.errno]
print(*fill("one"))
print(*fill("two"))
print(*fill("/dev/shm/one"))
"""
    outcome = hasty.run(program)
    one, two, shared = (line.split() for line in outcome.stdout.splitlines())
    assert one == [str(2 * 2**20), "EFBIG"]
    assert two[1] == "ENOSPC"
    assert int(two[0]) < 2 * 2**20  # the program itself takes the rest of 4 MiB
    assert (int(shared[0]), shared[1]) == (2**20, "ENOSPC")


def test_open_files_are_limited(hasty: Sandbox) -> None:
    assert "Too many open files" in hasty.run("files = [open('main.py') for _ in range(100)]").stderr
