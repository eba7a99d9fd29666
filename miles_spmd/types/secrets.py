"""Secrets of a user's environment, such as ``HF_TOKEN``: what a run records has their names in place of their values.

A value counts as secret where the variable's name ends as names of secrets do, and so does the password of a URL. A
value that names a file is none, and one of fewer than eight characters could be part of any text.
"""

from __future__ import annotations

import io
import os
import re
from functools import cache
from typing import Any, TextIO

_ENDS = ("TOKEN", "SECRET", "KEY", "KEY_ID", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "CREDENTIAL", "CREDENTIALS")
_LEAST = 8  # characters
_IN_URL = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")


@cache
def secrets() -> dict[str, str]:
    """Return what stands in the place of each secret value of this process's environment, longest values first."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        values = _IN_URL.findall(value)
        if name.upper().endswith(_ENDS) and not os.path.exists(value):
            values.append(value)
        found |= {each: f"${name}" for each in values if len(each) >= _LEAST}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def scrub(value: Any) -> Any:
    """Return ``value``, a text or JSON-like data, without secrets."""
    if isinstance(value, str):
        for secret, name in secrets().items():
            value = value.replace(secret, name)
        return value
    if isinstance(value, dict):
        return {key: scrub(each) for key, each in value.items()}
    return [scrub(each) for each in value] if isinstance(value, list) else value


class _Scrubbed(io.TextIOWrapper):
    def write(self, text: str) -> int:
        super().write(scrub(text))
        return len(text)


def scrubbed(stream: TextIO) -> TextIO:
    """Return ``stream``, or where the environment has secrets, one that writes to the same file without them."""
    if not secrets() or not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    wrapped = _Scrubbed(stream.buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
    wrapped.below = stream  # type: ignore[attr-defined]  # the file would be closed with the object around it
    return wrapped
