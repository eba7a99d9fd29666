"""Runs one response's code on tests, inside the sandbox; :mod:`miles_spmd.rewards.code` starts it and judges.

This file is sent into the sandbox as text, and imports the standard library alone. Processes of three kinds take part:

- the *driver* reads the tests from its standard input and writes one line of JSON for each to its standard output. It
  forks the others anew for every test and never runs the response;
- a *response process* runs the response. It has neither of these two descriptors, and no expected result in its memory;
- a *tester* runs the text of an assertion. The names that the text does not define are proxies there: the response
  process makes a call of one, and its result comes back as data. So it is the real ``==`` that compares, and whatever
  the response patches, prints or ends is that of its own process.

All run as the same user. Driver and tester are not dumpable, so that the response cannot open their memory in /proc. It
can send them signals, which only lets its own tests fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from miles_spmd.rewards.code_calls import run_test, send, serve

_PR_SET_DUMPABLE = 4
SIZE_DIGITS = 10  # before every message, its length
_CHUNK = 2**16  # bytes
_DESCRIPTORS = 256  # at least as many as a process may have open
_PASSED = b"passed"
_PROGRAM = "response.py"
# As on the sites that problems with functions come from.
_PRELUDE = compile(
    """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from typing import *
""",
    "prelude",
    "exec",
)


# --- the response process --------------------------------------------------------------------------------------------


def run_response(code: str) -> dict[str, Any]:
    """Run the code as a module and return its names."""
    module = types.ModuleType("response")
    sys.modules["response"] = module  # dataclasses and pickle look for it
    exec(_PRELUDE, module.__dict__)
    exec(compile(code, _PROGRAM, "exec"), module.__dict__)
    return module.__dict__


def call(code: str, name: str, arguments: list[Any], result: int) -> None:
    """Call a function of the response, or a method of its class Solution, and write what it returns as JSON."""
    names = run_response(code)
    function = names[name] if name in names else getattr(names["Solution"](), name)
    send(result, function(*arguments))


# --- the driver ------------------------------------------------------------------------------------------------------


def fork(work: Callable[..., None], *ends: int) -> int:
    """Return the number of a new process in a session of its own, which calls ``work`` with the only descriptors that
    it has: copies of the ``ends``."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, 3 + len(ends)) for one in (nothing, nothing, nothing, *ends)]
        for place, one in enumerate(high):
            os.dup2(one, place)
        os.closerange(len(high), _DESCRIPTORS)
        work(*range(3, len(high)))
        status = 0
    finally:
        os._exit(status)


def kill(number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(number, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.kill(number, signal.SIGKILL)  # it may not have a session yet


def read_all(source: int, limit: int, end: float) -> bytes | None:
    """Return everything up to the end of ``source``; None if it is more than ``limit`` bytes, or not all there at
    ``end``, a time of time.monotonic."""
    content = bytearray()
    while select.select([source], [], [], max(0.0, end - time.monotonic()))[0]:
        chunk = os.read(source, _CHUNK)
        content += chunk
        if not chunk:
            return bytes(content)
        if len(content) > limit:
            break
    return None


def read_frame() -> Any:
    """Return the next message of the standard input. Nothing behind it is read: what the driver has in its memory when
    it forks, the new process can find there."""
    return json.loads(_read_exactly(int(_read_exactly(SIZE_DIGITS))))


def _read_exactly(size: int) -> bytes:
    content = b""
    while len(content) < size:
        content += os.read(0, size - len(content))
    return content


def collect(work: Callable[..., None], *ends: int, limit: int, end: float) -> tuple[bytes | None, int]:
    """Return what a process that does ``work`` writes to its first descriptor, and its status."""
    source, sink = os.pipe()
    number = fork(work, sink, *ends)
    os.close(sink)
    content = read_all(source, limit, end)
    os.close(source)
    if content is None:
        kill(number)
    # it may have closed its end and go on: nothing that it does now counts
    while not (found := os.waitpid(number, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.0005)
    kill(number)
    status = found[1] if found[0] else os.waitpid(number, 0)[1]
    return content, status


def run_program(text: str, seconds: float, limit: int) -> dict[str, Any]:
    """Run the response as a program with the input ``text``, in an interpreter of its own."""
    with open("input", "w") as file:
        file.write(text)

    def work(sink: int) -> None:
        os.dup2(os.open("input", os.O_RDONLY), 0)
        os.dup2(sink, 1)
        os.closerange(3, _DESCRIPTORS)
        os.execv(sys.executable, [sys.executable, "-s", _PROGRAM])

    output, status = collect(work, limit=limit, end=time.monotonic() + seconds)
    return {"output": None if output is None or status else output.decode(errors="replace")}


def run_call(code: str, name: str, arguments: list[Any], seconds: float, limit: int) -> dict[str, Any]:
    def work(sink: int) -> None:
        call(code, name, arguments, sink)

    result, status = collect(work, limit=limit, end=time.monotonic() + seconds)
    return {"result": None if result is None or status else result.decode(errors="replace")}


def run_assertion(code: str, seconds: float) -> dict[str, Any]:
    end = time.monotonic() + seconds
    ours, theirs = socket.socketpair()
    response = fork(lambda channel: serve(run_response(code), channel), theirs.fileno())  # before the text is read
    theirs.close()
    text = read_frame()

    def work(sink: int, channel: int) -> None:
        run_test(text, channel)
        os.write(sink, _PASSED)

    try:
        verdict, _ = collect(work, ours.fileno(), limit=len(_PASSED), end=end)
    finally:
        kill(response)
        os.waitpid(response, 0)
        ours.close()
    return {"passed": verdict == _PASSED}


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
    sys.path.pop(0)  # the working directory, into which a response could write modules for the tester to import
    header = read_frame()
    if header["kind"] != "Programs":
        exec(_PRELUDE, {})  # once, not in every process
    gc.freeze()  # what is there now is not copied into every process that collects garbage
    code, seconds, limit = header["code"], header["seconds"], header["limit"]
    with open(_PROGRAM, "w", errors="surrogatepass") as file:
        file.write(code)
    for _ in range(header["tests"]):
        if header["kind"] == "Programs":
            found = run_program(seconds=seconds, limit=limit, **read_frame())
        elif header["kind"] == "Calls":
            found = run_call(code, seconds=seconds, limit=limit, **read_frame())
        else:
            found = run_assertion(code, seconds)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
