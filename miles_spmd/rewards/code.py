"""Whether the code of a response passes tests, which run in the sandbox.

What a program prints and what a function returns is compared here, outside: expected results never enter the sandbox.
Assertions are run by a process that does not run the response (:mod:`miles_spmd.rewards.code_driver`).
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from miles_spmd.rewards.code_driver import SIZE_DIGITS
from miles_spmd.rewards.code_tests import code_tests
from miles_spmd.sandbox.sandbox import Limits, Sandbox

_TEST_SECONDS = 5.0  # wall time of one test
_SECONDS = 25.0  # of all tests of a response; reward.reward_timeout, 30 s by default, comes later
_MEMORY_MIB = 1024
_PROCESSES = 24
_REPLY = 10_000  # bytes of a reply beside the result, and of what an error of the driver says
_FILE_MIB, _FOLDER_MIB = 64, 128  # inputs of programs are files there
_DRIVER, _CALLS = (Path(__file__).with_name(name) for name in ("code_driver.py", "code_calls.py"))
_FENCED = re.compile(r"^[ \t]*(`{3,})[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("python", "python3", "py")


def code(text: str, label: Any) -> dict[str, float]:
    """Return the ``score`` 1.0 if the code in ``text`` passes all tests of the label, else 0.0, and the share of the
    tests that it ``passed``.

    The code is the last block of the text that is fenced as Python, or else the last one without a language, or else
    the whole text. Raises ValueError for a label without tests, SandboxError if no sandbox can be made.
    """
    tests = code_tests(label)
    messages = tests.messages()
    header = {
        "kind": type(tests).__name__,
        "tests": len(messages),
        "code": python_code(text),
        "seconds": _TEST_SECONDS,
        "limit": tests.limit(),
    }
    limits = Limits(
        seconds=_SECONDS,
        cpu_seconds=int(_SECONDS),
        memory_mib=_MEMORY_MIB,
        processes=_PROCESSES,
        file_mib=_FILE_MIB,
        folder_mib=_FOLDER_MIB,
        output_bytes=len(messages) * (6 * tests.limit() + _REPLY),  # JSON writes some bytes as six
    )
    files = {"miles_spmd/rewards/code_calls.py": _CALLS.read_text()}
    outcome = Sandbox(limits).run(_DRIVER.read_text(), b"".join(map(_framed, [header, *messages])), files)
    # tests for which there was no time left have no reply
    replies = map(_parsed, outcome.stdout.splitlines())
    share = sum(tests.passed(index, reply) for index, reply in enumerate(replies)) / len(messages)
    return {"score": float(share == 1), "passed": share}


def python_code(text: str) -> str:
    """Return the code in a response, as :func:`code` takes it."""
    blocks = [(match[2].lower(), match[3]) for match in _FENCED.finditer(text)]
    for languages in (_PYTHON, ("",)):
        if found := [content for language, content in blocks if language in languages]:
            return textwrap.dedent(found[-1])
    return text


def _framed(message: Any) -> bytes:
    content = json.dumps(message).encode()
    return f"{len(content):{SIZE_DIGITS}d}".encode() + content


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:  # the driver was killed while it wrote
        return {}
    return found if isinstance(found, dict) else {}
