"""Calls of tools with real processes: every result and every failure is a text for the policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles_spmd.environments import execution
from miles_spmd.environments.calls import Call
from miles_spmd.environments.execution import ErrorKind, Result, Tool, Toolbox
from miles_spmd.environments.tool_schemas import SchemaError
from miles_spmd.plugins.plug_point import PlugPointError
from tests.environments import user_tools

HERE = "tests.environments.user_tools:"


@pytest.fixture(scope="module")
def toolbox() -> Iterator[Toolbox]:
    names = ("weather", "add", "lookup", "misbehave", "misbehave_async", "run")
    box = Toolbox([HERE + name for name in names], timeout=1.0, memory_gib=1.0, workers=3, longest=100)
    yield box
    box.close()


def run(box: Toolbox, *calls: tuple[str, dict[str, Any]]) -> list[Result]:
    return asyncio.run(box.run([Call(f"call{i}", name, arguments) for i, (name, arguments) in enumerate(calls)]))


def test_results_come_in_the_order_of_the_calls(toolbox: Toolbox) -> None:
    results = run(
        toolbox,
        ("lookup", {"key": "ø"}),
        ("add", {"a": 1, "b": 2.5}),
        ("weather", {"city": "Oslo", "tags": None}),
        ("weather", {"city": "Rome", "days": 3, "unit": "f", "tags": ["x"]}),
    )
    assert [result.text for result in results] == [
        '{"key": "ø", "näme": [1, null]}', "3.5", "Oslo: 1 x 19 c", "Rome: 3 x 19 f",
    ]  # fmt: skip
    assert {result.error for result in results} == {None}


def test_calls_of_a_message_run_at_the_same_time(toolbox: Toolbox) -> None:
    run(toolbox, *[("run", {"command": "start", "seconds": 0})] * 3)  # the processes start
    begin = time.monotonic()
    results = run(toolbox, *[("run", {"command": str(i)}) for i in range(3)], *[("lookup", {"key": "a"})] * 5)
    assert [result.text for result in results[:3]] == ["0", "1", "2"]
    assert time.monotonic() - begin < 1.4  # 3 x 0.5 s and 5 x 0.3 s one after the other


ERRORS: list[tuple[str, dict[str, Any], str, str]] = [
    ("nothing", {}, "unknown_tool", "the tool 'nothing' does not exist. The tools are weather, add, lookup"),
    ("weather", {}, "arguments", "the argument 'city' is missing. weather takes city (string), days (integer"),
    ("weather", {"city": "Oslo", "town": 1}, "arguments", "the argument 'town' does not exist"),
    ("weather", {"city": 3}, "arguments", "the argument 'city' is wrong: 3 is not of type 'string'"),
    ("weather", {"city": "a", "unit": "k"}, "arguments", "the argument 'unit' is wrong: 'k' is not one of ['c', 'f']"),
    ("weather", {"city": "a", "tags": ["x", 1]}, "arguments", "the argument 'tags'[1] is wrong: 1 is not"),
    ("misbehave", {"how": "raise"}, "raised", "Error: FileNotFoundError: [Errno 2] No such file: 'x.txt'"),
    ("misbehave", {"how": "raise unspeakably"}, "raised", "Error: Unspeakable"),
    ("misbehave", {"how": "exit"}, "raised", "Error: SystemExit: 3"),
    ("misbehave", {"how": "memory"}, "raised", "Error: MemoryError"),
    ("misbehave", {"how": "input"}, "raised", "Error: EOFError"),
    ("misbehave", {"how": "circle"}, "raised", "Error: ValueError: Circular reference"),
    ("misbehave", {"how": "end"}, "died", "misbehave ended its process (exit code 7)"),
    ("misbehave", {"how": "leave a program"}, "died", "misbehave ended its process (exit code 7)"),
    ("misbehave", {"how": "kill"}, "died", "misbehave ended its process (exit code -9, killed by SIGKILL)"),
    ("misbehave", {"how": "hang"}, "timeout", "misbehave took longer than 1 s and was stopped"),
    ("misbehave_async", {"how": "raise"}, "raised", "Error: KeyError: 'nothing here'"),
    ("misbehave_async", {"how": "time out"}, "raised", "Error: TimeoutError: of my own"),
    ("misbehave_async", {"how": "cancel"}, "raised", "Error: CancelledError"),
    ("misbehave_async", {"how": "exit"}, "raised", "Error: SystemExit"),
    ("misbehave", {"how": "coroutine"}, "raised", "the tool returned an object of the class coroutine"),
    ("misbehave_async", {"how": "interrupt"}, "raised", "Error: KeyboardInterrupt"),
    ("misbehave_async", {"how": "leave"}, "raised", "Error: Leave"),
    ("misbehave_async", {"how": "hang"}, "timeout", "misbehave_async took longer than 1 s"),
]  # fmt: skip


def test_every_failure_is_a_short_text_with_a_kind(toolbox: Toolbox) -> None:
    results = run(toolbox, *[(name, arguments) for name, arguments, _, _ in ERRORS])
    for (name, arguments, kind, text), result in zip(ERRORS, results, strict=True):
        assert result.error == kind, (name, arguments, result)
        assert text in result.text
        assert result.text.startswith("Error: ")
        assert "Traceback" not in result.text
        assert str(Path(__file__).parent) not in result.text
    assert {kind for _, _, kind, _ in ERRORS} | {"malformed"} == set(ErrorKind)
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] in (["sleep", "6174"], ["sleep", "6175"])
    ]
    assert run(toolbox, ("add", {"a": 1, "b": 1})) == [Result("2.0")]


def test_a_call_that_cannot_be_read(toolbox: Toolbox) -> None:
    call = Call("call0", "weather", problem="it is not valid JSON", text="{broken")
    (result,) = asyncio.run(toolbox.run([call]))
    assert result.error is ErrorKind.MALFORMED
    assert "it is not valid JSON" in result.text


def test_results_as_text(toolbox: Toolbox) -> None:
    texts = [
        run(toolbox, ("misbehave", {"how": how}))[0].text for how in ("long", "object", "surrogate", "none", "set")
    ]
    assert texts[0] == "x" * 100 + "\n[... cut: the first 100 of 100,000 characters are shown]"
    assert texts[1].endswith('"ids": [1, 2]}')
    assert texts[2] == "half ? pair"
    assert texts[3] == "null"
    assert texts[4] == '{"words": ["a", "b", "c"], "numbers": [0, 1, 2], "one": 0.5}'


def test_a_process_that_has_leaked_its_memory_is_replaced() -> None:
    box = Toolbox([HERE + "misbehave"], memory_gib=1.0, workers=1)
    texts = [run(box, ("misbehave", {"how": "leak"}))[0].text for _ in range(4)]
    assert texts == ["1", "Error: MemoryError", "1", "Error: MemoryError"]
    box.close()


def test_processes_see_what_this_one_sees_and_end_with_the_toolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_KEY", "1")
    box = Toolbox([HERE + "misbehave"], workers=1)
    assert run(box, ("misbehave", {"how": "secrets"}))[0].text == '["SEARCH_KEY"]'
    process = psutil.Process(int(run(box, ("misbehave", {"how": "id"}))[0].text))
    box.close()
    assert not process.is_running()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Python says of "everything"
@pytest.mark.parametrize("how", ["once", "always", "everything"])
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_tool_that_goes_on_when_it_is_cancelled_is_ended(
    how: str, cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_TIME_TO_END", 0.1)
    box = Toolbox([user_tools.stubborn], timeout=60.0 if cancelled else 0.1)
    reported: list[Any] = []
    user_tools.STUBBORN.clear()

    async def call() -> list[Result] | None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        episode = asyncio.ensure_future(box.run([Call("call0", "stubborn", {"how": how})]))
        if cancelled:
            while not user_tools.STUBBORN:
                await asyncio.sleep(0)
            episode.cancel()
        (done,), _ = await asyncio.wait([episode], timeout=30)
        assert asyncio.all_tasks() == {asyncio.current_task()}  # nothing is left in the event loop
        return None if done.cancelled() else done.result()

    results = asyncio.run(call())
    if cancelled:
        assert results is None
    else:
        assert [result.error for result in results or []] == [ErrorKind.TIMEOUT]
    assert user_tools.STUBBORN[-1] == ("goes on" if how == "everything" else "ends")
    assert "goes on" in user_tools.STUBBORN
    assert reported == []


def test_functions_in_place_of_names() -> None:
    async def closure(key: str) -> str:
        """Runs in this process, so that it may be defined anywhere.

        Args:
            key: Anything.
        """
        return f"{key}!"

    box = Toolbox([user_tools.add, closure, Tool(user_tools.untyped, {"name": "forecast"})])
    assert run(box, ("closure", {"key": "a"}), ("add", {"a": 1, "b": 1})) == [Result("a!"), Result("2.0")]
    assert [schema["function"]["name"] for schema in box.schemas] == ["add", "closure", "forecast"]
    box.close()

    def plain(key: str) -> str:
        """Cannot be imported.

        Args:
            key: Anything.
        """
        return key

    with pytest.raises(SchemaError, match="tool 'plain' runs in a process of its own, which cannot import it"):
        Toolbox([plain])


def test_tools_that_cannot_be_used() -> None:
    with pytest.raises(SchemaError, match="two tools have the name 'add'"):
        Toolbox([HERE + "add", user_tools.add])
    with pytest.raises(PlugPointError, match="cannot be imported: AttributeError"):
        Toolbox([HERE + "nothing"])
    with pytest.raises(SchemaError, match="schema of tool 'x' is not valid: 'strnig' is not valid"):
        Toolbox([Tool(user_tools.add, {"name": "x", "parameters": {"properties": {"a": {"type": "strnig"}}}})])
