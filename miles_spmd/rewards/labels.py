r"""What the built-in rewards accept as a label. Imports nothing that takes time: data is checked while it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from miles_spmd.rewards.code_tests import code_tests

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]|\\[{}\\]")


def check_label(rm_type: str, label: Any) -> str | None:
    """Return why the built-in reward ``rm_type`` cannot read ``label``; None if it can, or is not built in."""
    read = _READERS.get(rm_type)
    try:
        if read is not None:
            read(label)
    except ValueError as error:
        return str(error)
    return None


def exact_labels(label: Any) -> list[str]:
    """Return the strings of which a response has to equal one. Raises ValueError for a label without one."""
    labels = label if isinstance(label, list | tuple) else [label]
    # What true or b"1" is as text is Python's affair, and NaN is how pandas writes a value that is missing.
    if not labels or any(one is None or isinstance(one, bool | bytes | dict | list | tuple) for one in labels):
        raise ValueError(f"the label {label!r:.80} is neither a string, a number nor a list of these")
    if any(isinstance(one, float | Decimal) and not math.isfinite(one) for one in labels):
        raise ValueError(f"the label {label!r:.80} is not a finite number")
    return [str(one) for one in labels]


def math_label(label: Any) -> str:
    r"""Return the number or formula of a label: all of it, the content of its last ``\boxed{...}``, or the text after
    ``####``, as in GSM8K's solutions. Raises ValueError if there is none."""
    if isinstance(label, bool) or not isinstance(label, str | int | float | Decimal):
        raise ValueError(f"the label {label!r:.80} is neither a string nor a number")
    if isinstance(label, float | Decimal):
        if not math.isfinite(label):
            raise ValueError(f"the label {label} is not a finite number")
        return f"{Decimal(str(label)):f}"  # 1e+16 would be read as 1 times e plus 16
    text = str(label).rpartition("####")[2].strip()
    text = (last_boxed(text) or text).strip()
    if not text:
        raise ValueError(f"the label {label!r:.80} has neither a number nor a formula")
    return text


def choice_label(label: Any) -> str:
    """Return the letter of a multiple-choice label: a letter, also in brackets, or the number of the choice from 0.
    Raises ValueError for any other label."""
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 26:
        return chr(ord("A") + label)
    found = re.fullmatch(r"\s*\(?([A-Za-z])\)?\.?\s*", label) if isinstance(label, str) else None
    if found is None:
        raise ValueError(f"the label {label!r:.80} is neither a letter nor the number of a choice from 0 to 25")
    return found[1].upper()


def last_boxed(text: str) -> str | None:
    r"""Return the content of the complete ``\boxed{...}`` (or ``\fbox``) that starts last; None: none."""
    best: tuple[int, int] | None = None
    unclosed: list[int | None] = []  # where the content of an open box begins, None for any other brace
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start = unclosed.pop() if unclosed else None
            if start is not None and (best is None or start > best[0]):
                best = start, match.start()
        elif token == "{":
            unclosed.append(None)
        elif len(token) > 2:  # not an escaped brace or backslash
            unclosed.append(match.end())
    return None if best is None else text[slice(*best)]


_READERS: dict[str, Callable[[Any], object]] = {
    "math": math_label,
    "exact": exact_labels,
    "f1": exact_labels,
    "gpqa": choice_label,
    "code": code_tests,
}
