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

import ast
import builtins
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

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


class NotData(TypeError):
    """A value that cannot travel between processes: a function, a module, an object of a class of the response."""


# --- values as JSON --------------------------------------------------------------------------------------------------


def refuse(value: Any) -> NoReturn:
    raise NotData(f"a value of type {type(value).__name__} cannot be passed as data")


def encode(value: Any, other: Callable[[Any], Any] = refuse) -> Any:
    """Return ``value`` as JSON for :func:`decode`. What JSON does not have becomes an object with the name of its type;
    ``other`` is called with a value that is not data."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else {"float": repr(value)}
    if isinstance(value, list):
        return [encode(one, other) for one in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(one, other) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, other), encode(one, other)] for key, one in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return other(value)


def decode(found: Any, other: Callable[[Any], Any] = refuse) -> Any:
    """Return the value that was encoded. ``other`` is called with what its namesake has written."""
    if isinstance(found, list):
        return [decode(one, other) for one in found]
    if not isinstance(found, dict):
        return found
    ((kind, content),) = found.items()
    if kind in ("tuple", "set", "frozenset"):
        return getattr(builtins, kind)(decode(one, other) for one in content)
    if kind == "dict":
        return {decode(key, other): decode(one, other) for key, one in content}
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    return other(found)


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
    _send(result, function(*arguments))


MUTABLE = (list, dict, set)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *arguments, **named: target(*arguments, **named),
    "attribute": lambda target, name: getattr(target, name),
    "item": lambda target, key: target[key],
    "list": lambda target: list(target),
    "len": lambda target: len(target),
    "str": lambda target: str(target),
    "equal": lambda target, other: bool(target == other),
}


def serve(code: str, channel: int) -> None:
    """Run the response and then do what a tester asks for: one line of JSON each, and one in reply."""
    names = run_response(code)
    objects: list[Any] = []

    def keep(value: Any) -> dict[str, int]:
        objects.append(value)
        return {"object": len(objects) - 1}

    def find(place: dict[str, Any]) -> Any:
        return objects[place["object"]] if "object" in place else names[place["name"]]

    with open(channel, "rb", closefd=False) as requests:
        _send(channel, "ready")
        for line in requests:
            operation, target, arguments, named = json.loads(line)
            try:
                given = [decode(one, find) for one in (arguments, named)]
                value = OPERATIONS[operation](find(target), *given[0], **given[1])
                after = [encode(one, keep) if isinstance(one, MUTABLE) else None for one in given[0]]
                changed = {i: one for i, one in enumerate(after) if one is not None and one != arguments[i]}
                _send(channel, ["value", encode(value, keep), changed])
            except BaseException as error:
                _send(channel, ["raised", type(error).__name__, str(error)])


def _send(channel: int, message: Any) -> None:
    with open(channel, "wb", closefd=False) as file:
        file.write(json.dumps(message).encode() + b"\n")


# --- the tester ------------------------------------------------------------------------------------------------------


class Proxy:
    """A name of the response, or an object of it that is not data. It equals nothing but another proxy, whatever its
    own ``__eq__`` would claim."""

    def __init__(self, ask: Callable[..., Any], place: dict[str, Any]) -> None:
        self._ask, self._place = ask, place

    def __getattr__(self, name: str) -> Any:
        return self._ask("attribute", self, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", self, *arguments, **named)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self, key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("list", self))

    def __len__(self) -> int:
        return int(self._ask("len", self))

    def __str__(self) -> str:
        return str(self._ask("str", self))

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proxy) and self._ask("equal", self, other) is True

    __hash__ = object.__hash__


def run_test(text: str, channel: int) -> None:
    """Run the text of an assertion. Raises whatever it raises, and EOFError where the response has ended."""
    replies = open(channel, "rb", closefd=False)  # noqa: SIM115  # the process ends with the test

    def receive() -> Any:
        line = replies.readline()
        if not line:
            raise EOFError("the response has ended its process")
        return json.loads(line)

    def place(value: Any) -> dict[str, Any]:
        return value._place if isinstance(value, Proxy) else refuse(value)

    def proxy(found: dict[str, Any]) -> Proxy:
        return Proxy(ask, found)

    def ask(operation: str, target: Proxy, *arguments: Any, **named: Any) -> Any:
        _send(channel, [operation, target._place, encode(list(arguments), place), encode(named, place)])
        kind, *content = receive()
        if kind == "value":
            value, changed = (decode(one, proxy) for one in (content[0], list(content[1].values())))
            for index, new in zip(content[1], changed):  # a function may change what it is given
                given = arguments[int(index)]
                given.clear()
                (given.extend if isinstance(given, list) else given.update)(new)
            return value
        known = getattr(builtins, content[0], None)
        is_exception = isinstance(known, type) and issubclass(known, Exception)
        raise known(content[1]) if is_exception else RuntimeError(": ".join(content))  # type: ignore[misc]

    receive()  # that the response has been run
    exec(compile(text, "test", "exec"), {"__name__": "test", **_missing_names(text, ask)})


def _missing_names(text: str, ask: Callable[..., Any]) -> dict[str, Any]:
    """Return what the text's names mean that are not Python's own: modules of the standard library where something is
    looked up in them (``math.isclose``), otherwise names of the response."""
    tree = ast.parse(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(dir(builtins))
    modules = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    } & sys.stdlib_module_names
    return {
        name: importlib.import_module(name) if name in modules else Proxy(ask, {"name": name}) for name in sorted(names)
    }


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
    response = fork(lambda channel: serve(code, channel), theirs.fileno())  # before the text is read
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
    exec(_PRELUDE, {})  # once, not in every process
    gc.freeze()  # what is there now is not copied into every process that collects garbage
    header = read_frame()
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
