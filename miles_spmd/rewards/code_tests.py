"""The tests of a ``code`` label. Imports nothing that takes time: data is checked while it is read."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

_SLACK = 4096  # bytes by which a result may be longer than twice the longest one before reading it stops


class Programs(NamedTuple):
    """The response is a program that reads its standard input and writes its standard output."""

    inputs: list[str]
    outputs: list[str]

    def messages(self) -> list[Any]:
        """Return what the driver in the sandbox is sent for each test."""
        return [{"text": text} for text in self.inputs]

    def limit(self) -> int:
        """Return how many bytes of a result are read. It is one number for all tests, because the driver has it in its
        memory: that of one test would tell the response how long the right result is."""
        return _limit(self.outputs)

    def passed(self, index: int, reply: dict[str, Any]) -> bool:
        """Whether the driver's reply to a test is right: the same lines, without white space at their ends."""
        output = reply.get("output")
        return isinstance(output, str) and _stripped(output) == _stripped(self.outputs[index])


class Calls(NamedTuple):
    """The response has a function, alone or in a class Solution; values are those of JSON."""

    name: str
    inputs: list[list[Any]]  # the arguments of each call
    outputs: list[Any]

    def messages(self) -> list[Any]:
        return [{"name": self.name, "arguments": arguments} for arguments in self.inputs]

    def limit(self) -> int:
        return _limit(map(json.dumps, self.outputs))

    def passed(self, index: int, reply: dict[str, Any]) -> bool:
        try:
            return bool(json.loads(reply["result"]) == self.outputs[index])
        except (KeyError, TypeError, ValueError, RecursionError):  # what a response returns is arbitrary
            return False


class Assertions(NamedTuple):
    """Python statements that use what the response defines, and raise where it is wrong."""

    texts: list[str]

    def messages(self) -> list[Any]:
        return list(self.texts)

    def limit(self) -> int:
        return 0

    def passed(self, index: int, reply: dict[str, Any]) -> bool:
        return reply.get("passed") is True


def code_tests(label: Any) -> Programs | Calls | Assertions:
    """Return the tests of a label: ``{"inputs": ..., "outputs": ...}``, with ``fn_name`` for calls of a function, or a
    list of assertions; also as JSON text, or one text of Python. Raises ValueError for anything else."""
    found = _read(label) if isinstance(label, str) else label
    if isinstance(found, list | tuple) and found and all(isinstance(one, str) for one in found):
        return Assertions([_parsed(one) for one in found])
    if not isinstance(found, dict) or not {"inputs", "outputs"} <= found.keys():
        raise ValueError(
            f"the label {label!r:.80} is neither a list of assertions nor an object with 'inputs' and 'outputs'"
        )
    inputs, outputs = found["inputs"], found["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError(f"the label {label!r:.80} must have as many 'inputs' as 'outputs', and at least one")
    if found.get("fn_name") is None:
        return Programs(*([_lines(one, label) for one in some] for some in (inputs, outputs)))
    if not isinstance(found["fn_name"], str) or not all(isinstance(one, list) for one in inputs):
        raise ValueError(f"the label {label!r:.80} must have a list of arguments for each call of its 'fn_name'")
    return Calls(found["fn_name"], inputs, outputs)


def _read(label: str) -> Any:
    try:
        found = json.loads(label)
    except (ValueError, RecursionError):
        return [label]
    return [found] if isinstance(found, str) else found


def _parsed(text: str) -> str:
    try:
        if ast.parse(text).body:
            return text
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the label's test {text!r:.80} is not Python: {error}") from None
    raise ValueError(f"the label's test {text!r:.80} is empty")


def _lines(text: Any, label: Any) -> str:
    """Return an input or output: a string, or a list with its lines."""
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        return "\n".join(text)
    if not isinstance(text, str):
        raise ValueError(
            f"the label {label!r:.80} has {text!r:.40} among its inputs and outputs, which must be strings"
        )
    return text


def _limit(expected: Iterable[str]) -> int:
    return 2 * max(len(one.encode(errors="replace")) for one in expected) + _SLACK


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
