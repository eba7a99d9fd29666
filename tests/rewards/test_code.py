"""The reward ``code``: what passes, what does not, and what only pretends to."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import pytest

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.plugins.reward import RewardError, Score
from miles_spmd.rewards import code_calls
from miles_spmd.rewards.code import code, python_code
from miles_spmd.rewards.functions import load_reward
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.sandbox import sandbox
from miles_spmd.types.sample import Prompt, Sample
from tests.samples import sample_of

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

PROGRAMS = {"inputs": ["1 2\n", "3 4\n", "10 -10\n"], "outputs": ["3\n", "7", "0"]}
CALLS = {"fn_name": "add", "inputs": [[1, 2], ["a", "b"], [[1], [2]]], "outputs": [3, "ab", [1, 2]]}
ASSERTIONS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add((1,), (2,)) == (1, 2)"]
RIGHT = {
    "programs": ("print(sum(map(int, input().split())))", PROGRAMS),
    "calls": ("def add(a, b): return a + b", CALLS),
    "a method": ("class Solution:\n    def add(self, a: List[int], b): return a + b", CALLS),
    "assertions": ("def add(a, b): return a + b", ASSERTIONS),
}


def passed(text: str, label: Any) -> float:
    found = code(text, label)
    assert found["score"] == float(found["passed"] == 1)
    return found["passed"]


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nIt works."


@needs_bubblewrap
@pytest.mark.parametrize("name", RIGHT)
def test_right_code_passes(name: str) -> None:
    program, label = RIGHT[name]
    assert passed(fenced(program), label) == 1
    assert passed(program, json.dumps(label)) == 1


@needs_bubblewrap
def test_the_share_of_passed_tests_is_in_the_detail() -> None:
    wrong_once = "print(max(0, sum(map(int, input().split()))) or 'nothing')"
    assert code(wrong_once, PROGRAMS) == {"score": 0.0, "passed": pytest.approx(2 / 3)}
    strings_only = "def add(a, b): return str(a) + str(b)"
    assert passed(strings_only, CALLS) == passed(strings_only, ASSERTIONS) == pytest.approx(1 / 3)


WRONG = {
    "nothing": "",
    "prose": "The sum is a + b.",
    "raises": "raise ValueError",
    "exits": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits later": "import os\nadd = lambda a, b: os._exit(0)",
    "has another name": "def plus(a, b): return a + b",
    "prints a verdict": """
import os
for number in range(256):
    for text in ('passed', '{"passed": true}\\n', '{"output": "3"}\\n', '{"result": "3"}\\n'):
        try: os.write(number, text.encode())
        except OSError: pass
os._exit(0)""",
    "a number that equals everything": """
class Anything(int):
    __eq__ = lambda *_: True
    __hash__ = int.__hash__
add = lambda a, b: Anything()""",
    "an object that equals everything": """
class Anything:
    __eq__ = lambda *_: True
    __iter__ = lambda self: iter([self] * 3)
add = lambda a, b: Anything()""",
    "patches": """
import builtins, json, os, sys
builtins.AssertionError = builtins.Exception
builtins.compile = builtins.exec = lambda *_: None
json.loads = lambda *_: 3
sys.excepthook = sys.settrace = os._exit = print
add = lambda a, b: None""",
    "searches memory": """
import gc, sys
frame, found = sys._getframe(), [one for one in gc.get_objects() if isinstance(one, dict)]
while frame:
    found.append(frame.f_locals)
    frame = frame.f_back
texts = [text for one in found for text in list(one.values()) if isinstance(text, str) and "assert add(" in text]
def add(a, b): return eval(texts[0].split("==")[1])""",
    "kills all": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "ends the driver": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nadd = lambda a, b: None",
    "writes modules": """
forged = "import os\\nfor n in range(20):\\n    try: os.write(n, b'passed')\\n    except OSError: pass\\n"
for name in ("decimal", "json", "builtins", "encodings", "main", "response", "sitecustomize"):
    open(name + ".py", "w").write(forged)
add = lambda a, b: None""",
    "writes the verdict of the tester": """
import os
def add(a, b):
    tester = max(int(name) for name in os.listdir("/proc") if name.isdigit())  # the youngest process
    open(f"/proc/{tester}/fd/3", "wb", buffering=0).write(b"passed")""",
}


@needs_bubblewrap
@pytest.mark.parametrize("name", WRONG)
def test_wrong_code_does_not_pass(name: str) -> None:
    for label in (CALLS, [*ASSERTIONS, "import decimal\nassert add(1, 1) == decimal.Decimal(2)"]):
        assert passed(fenced(WRONG[name]), label) == 0
    if "add" not in WRONG[name]:
        assert passed(fenced(WRONG[name]), PROGRAMS) == 0


@needs_bubblewrap
def test_expected_results_are_not_in_the_memory_of_the_response() -> None:
    """The response looks for a number that only its label has, in its own memory and in that of the others."""
    program = """
import gc, glob, sys
def find(a, b):
    needle = str(a * b)
    for path in ["main.py", "response.py", *glob.glob("/proc/[0-9]*/cmdline"), *glob.glob("/proc/[0-9]*/mem")]:
        try:
            if needle in open(path, errors="replace").read(): return "in a file"
        except OSError: pass
    texts = [one for one in gc.get_objects() if isinstance(one, (dict, list, tuple))]
    del path
    frame = sys._getframe(1)
    while frame:
        texts.append(frame.f_locals)
        frame = frame.f_back
    return "in memory" if any(needle in repr(list(one.values()) if isinstance(one, dict) else one)[:100_000]
                              for one in texts if one is not texts and len(one) < 100) else "nowhere"
"""
    a, b = 123456789, 987654321
    secret = str(a * b)
    seen = program.replace("needle = str(a * b)", "needle = str(a)")
    assert passed(program, {"fn_name": "find", "inputs": [[a, b]], "outputs": ["nowhere"]}) == 1
    assert passed(program, [f"{secret}\nassert find({a}, {b}) == 'nowhere'"]) == 1
    assert passed(seen, {"fn_name": "find", "inputs": [[a, b]], "outputs": ["in memory"]}) == 1  # its own argument


@needs_bubblewrap
def test_values_are_compared_as_python_compares_them() -> None:
    program = """
import collections
Point = collections.namedtuple("Point", "x y")
def same(value): return value
def counted(text): return collections.Counter(text)
def point(): return Point(1, 2)
def lazy(n): return (i * i for i in range(n))
def sum(*items): return "replaced"
def without(items, kind): return [one for one in items if not isinstance(one, kind)]
def fails(n): raise KeyError(n)
def change(items, table, members):
    items.sort()
    table["new"] = items
    members.discard(1)
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
    def __str__(self): return f"Stack{self.items}"
"""
    values = ["(1, [2])", "{1, 2}", "{(1, 2): {'a': None}}", "b'x'", "1.5", "1e999", "2j", "10**30", "'é'", "[True]"]
    values.append("frozenset([(1,)])")
    right = [f"assert same({value}) == {value}" for value in values] + [
        "assert counted('aab') == {'a': 2, 'b': 1}",
        "assert point() == (1, 2)",
        "assert point() != [1, 2]",
        "assert list(lazy(3)) == [0, 1, 4] and sum(lazy(4)) == 14",
        "try:\n    fails(1)\nexcept KeyError:\n    pass\nelse:\n    raise AssertionError",
        "assert math.isclose(same(0.1) + same(0.2), 0.3)",
        "s = Stack(1)\ns.push(2).push(3)\nassert len(s) == 3 and s.items == [1, 2, 3] and str(s) == 'Stack[1, 2, 3]'",
        "assert Stack(1, 2) == Stack(1).push(2) and Stack() != Stack(1)",
        "def check(candidate):\n    for n in range(5):\n        assert candidate(n) == n\ncheck(same)",
        "assert same(value=3) == 3 and same(Stack(5)).items[0] == 5",
        "a, b, c, d = [2, 1], {}, {1, 2}, []\nchange(a, b, c)\nassert (a, b, c) == ([1, 2], {'new': [1, 2]}, {2})",
        "s = Stack(1)\ns.items, s.name = [7], 'seven'\nassert s.items == [7] and s.name == 'seven'",
        "assert without([1, 'a', 2.5], str) == [1, 2.5] and without([1], same(int)) == []",
        "assert sum(1, 2) == 'replaced'",
        "assert sum([same(1), same(2)]) == 3",
        "assert not same(0) and same([]) == [] and same(1) in (1, 2)",
    ]
    assert passed(program, right) == 1
    wrong = [
        "assert same((1,)) == [1]",
        "assert same(1) == 2",
        "assert Stack(1) == Stack(2)",
        "fails(1)",
        "assert Stack() == 0",
    ]
    assert passed(program, wrong) == 0
    calls = {"fn_name": "same", "inputs": [[[1, 2]], [{"a": [1.5]}], [None]], "outputs": [[1, 2], {"a": [1.5]}, None]}
    assert passed(program, calls) == 1
    assert passed(program, {"fn_name": "point", "inputs": [[]], "outputs": [[1, 2]]}) == 1  # a tuple is a list


@needs_bubblewrap
def test_outputs_are_compared_by_lines() -> None:
    def same(printed: str, expected: str) -> bool:
        return passed(f"print({printed!r}, end='')", {"inputs": [""], "outputs": [expected]}) == 1

    assert same("1 \n2\t\n\n", "1\n2")
    assert same("", "\n")
    assert not same("1 2", "1\n2")
    assert not same(" 1", "1")
    assert not same("1.0", "1")
    assert not same("1" * 10_000, "1")


@needs_bubblewrap
def test_programs_are_run_as_programs() -> None:
    program = """
import sys, threading
if __name__ == "__main__":
    threading.Thread(target=lambda: print(sys.stdin.readline().strip(), *sys.argv)).start()
    exit()
"""
    assert passed(program, {"inputs": ["in\n"], "outputs": ["in response.py"]}) == 1
    assert passed("print(1)\n1 / 0", {"inputs": [""], "outputs": ["1"]}) == 0
    longer = "x" * 2**20
    assert passed("print(input()[::-1])", {"inputs": [longer], "outputs": [longer]}) == 1


@needs_bubblewrap
@pytest.mark.parametrize("name", ["programs", "calls", "assertions"])
def test_a_test_without_end_fails_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_spmd.rewards.code._TEST_SECONDS", 1.0)
    function = "def f(n):\n    while n == 1: pass\n    return n"
    program, label = {
        "programs": (
            "n = int(input())\nwhile n == 1: pass\nprint(n)",
            {"inputs": ["0", "1", "2"], "outputs": ["0", "1", "2"]},
        ),
        "calls": (function, {"fn_name": "f", "inputs": [[0], [1], [2]], "outputs": [0, 1, 2]}),
        "assertions": (function, [f"assert f({n}) == {n}" for n in range(3)]),
    }[name]
    assert passed(program, label) == pytest.approx(2 / 3)


@needs_bubblewrap
def test_all_tests_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_spmd.rewards.code._SECONDS", 2.0)
    monkeypatch.setattr("miles_spmd.rewards.code._TEST_SECONDS", 1.0)
    start = time.monotonic()
    slow = "import time\ndef f(n):\n    time.sleep(0 if n == 0 else 9)\n    return n"
    assert passed(slow, {"fn_name": "f", "inputs": [[n] for n in range(20)], "outputs": list(range(20))}) == 1 / 20
    assert time.monotonic() - start < 6


def test_the_code_of_a_response() -> None:
    assert python_code("a = 1") == "a = 1"
    assert python_code("```python\nfirst\n```\n```py\nlast\n```\n```\noutput\n```") == "last\n"
    assert python_code("```\nfirst\n```\n```\nlast\n```\n```bash\nls\n```") == "last\n"
    assert python_code("1. So:\n   ```python\n   if x:\n       y\n   ```\n") == "if x:\n    y\n"
    assert python_code("````python\ns = '''\n```\nx\n```\n'''\n````") == "s = '''\n```\nx\n```\n'''\n"
    assert python_code("```python\nunfinished = ") == "unfinished = "
    assert python_code("use `x` and ```y```") == "use `x` and ```y```"


def test_only_data_travels() -> None:
    for value in ([1, (2.5, {"a": {b"b"}})], {1: frozenset({2})}, float("-inf"), 3 + 4j, True, None):
        found = code_calls.decode(json.loads(json.dumps(code_calls.encode(value))))
        assert (found, type(found)) == (value, type(value))
    with pytest.raises(code_calls.NotData, match="type object cannot be passed"):
        code_calls.encode([object()])


# --- in the pool ------------------------------------------------------------------------------------------------------


def sample(text: str, label: Any) -> Sample:
    return sample_of(Prompt("data:1", "", [0], label), 0, [], text=text)


@needs_bubblewrap
def test_the_pool_scores_code() -> None:
    """In its processes, whose address space is limited."""
    config = RewardConfig(rm_type="code", reward_workers=1, reward_memory_gib=0.5, reward_timeout=4)
    with RewardPool(config) as pool:
        program, label = RIGHT["calls"]
        assert pool.submit([sample(program, label)]).result() == [Score(1.0, {"passed": 1.0, "killed": 0.0})]
        slow = "import time\ntime.sleep(9)"
        assert pool.submit([sample(slow, label)]).result() == [Score(0.0, {"killed": 1.0})]
        assert pool.submit([sample(program, label)]).result()[0].value == 1


def test_without_a_sandbox_nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    sandbox._probe.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(PlugPointError, match="'code' requires the sandbox: bwrap is not in PATH"):
            load_reward("code", batched=False)
        with pytest.raises(RewardError, match="bwrap is not in PATH"):
            RewardPool(RewardConfig(rm_type="code", reward_workers=1))
    finally:
        sandbox._probe.cache_clear()
