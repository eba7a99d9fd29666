"""Calls between two processes in the sandbox: a tester, which runs an assertion, and a response process.

The tester has proxies in the place of what the response defines. A call of one is made in the response process, and its
result comes back as data, so that the tester compares real values by the real ``==``. As the file is sent into the
sandbox with :mod:`miles_spmd.rewards.code_driver`, it imports the standard library alone.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


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
    name = getattr(value, "__name__", None)
    if isinstance(value, type | types.BuiltinFunctionType) and getattr(builtins, str(name), None) is value:
        return {"builtin": name}
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
    if kind == "builtin":
        return getattr(builtins, content)
    return other(found)


# --- the response process --------------------------------------------------------------------------------------------

MUTABLE = (list, dict, set)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *arguments, **named: target(*arguments, **named),
    "attribute": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "list": list,
    "len": len,
    "str": str,
    "equal": lambda target, other: bool(target == other),
}


def serve(names: dict[str, Any], channel: int) -> None:
    """Do what a tester asks for with the ``names`` of a response: one line of JSON each, and one in reply."""
    objects: list[Any] = []

    def keep(value: Any) -> dict[str, int]:
        objects.append(value)
        return {"object": len(objects) - 1}

    def find(place: dict[str, Any]) -> Any:
        if "object" in place:
            return objects[place["object"]]
        if place["name"] not in names:
            raise NameError(f"name {place['name']!r} is not defined")
        return names[place["name"]]

    with open(channel, "rb", closefd=False) as requests:
        send(channel, "ready")
        for line in requests:
            operation, target, arguments, named = json.loads(line)
            try:
                given = [decode(one, find) for one in (arguments, named)]
                value = OPERATIONS[operation](find(target), *given[0], **given[1])
                after = [encode(one, keep) if isinstance(one, MUTABLE) else None for one in given[0]]
                changed = {i: one for i, one in enumerate(after) if one is not None and one != arguments[i]}
                send(channel, ["value", encode(value, keep), changed])
            except BaseException as error:
                send(channel, ["raised", type(error).__name__, str(error)])


def send(channel: int, message: Any) -> None:
    with open(channel, "wb", closefd=False) as file:
        file.write(json.dumps(message).encode() + b"\n")


# --- the tester ------------------------------------------------------------------------------------------------------


class Proxy:
    """A name of the response, or an object of it that is not data. It equals nothing but another proxy, whatever its
    own ``__eq__`` would claim."""

    def __init__(self, ask: Callable[..., Any], place: dict[str, Any]) -> None:
        self.__dict__.update(_ask=ask, _place=place)

    def __getattr__(self, name: str) -> Any:
        return self._ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self, name, value)

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
        send(channel, [operation, target._place, encode(list(arguments), place), encode(named, place)])
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
    nodes = list(ast.walk(ast.parse(text)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    looked_up = {
        node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    # a test of a function that is called `sum` has no other name; elsewhere the response may not replace Python's own
    missing = names - set(dir(builtins)) or (called if len(called) == 1 else set())
    modules = looked_up & missing & sys.stdlib_module_names
    return {one: importlib.import_module(one) if one in modules else Proxy(ask, {"name": one}) for one in missing}
