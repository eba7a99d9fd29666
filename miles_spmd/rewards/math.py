r"""Mathematical equivalence of an answer and a label, by math-verify (https://github.com/huggingface/Math-Verify).

What a policy writes is arbitrary, so nothing that it writes is an error here: an answer that cannot be parsed, or not
compared in time, is wrong. math-verify limits its time by SIGALRM, which works in the main thread of a process only and
does not interrupt a long computation inside C; the reward pool therefore runs this in the main thread of its processes,
and an answer whose process it has to kill counts as wrong, too.
"""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

_TAIL = 2000  # characters at the end of a response that are searched for an answer outside a box
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]|\\[{}\\]")
_LONGEST = 1000  # characters of a boxed answer; the parser's time grows faster than its length


def math(text: str, label: Any) -> float:
    r"""Return 1.0 if the answer in ``text`` equals ``label`` as mathematics, else 0.0.

    The answer is the content of the last ``\boxed{...}``, or without one the last number or LaTeX formula. The label is
    a number, or a string with a number or formula; of GSM8K's solutions only the text after ``####`` counts. Raises
    ValueError for any other label.
    """
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f"the label {label!r} is neither a string nor a number")
    gold = _gold_text(label)
    answer = last_boxed(text)
    if answer is not None and answer.strip() == gold:
        return 1.0
    if answer is not None and len(answer) > _LONGEST:
        return 0.0
    try:
        found = parse(text[-_TAIL:] if answer is None else f"\\boxed{{{answer}}}", raise_on_error=True)
        return float(bool(found) and verify(_parse_gold(gold), found, raise_on_error=True))
    except (Exception, TimeoutException):  # sympy raises anything; TimeoutException is a BaseException
        return 0.0


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


def _gold_text(label: str | int | float) -> str:
    if isinstance(label, float):
        return f"{Decimal(repr(label)):f}"  # 1e+16 would be read as 1 times e plus 16
    text = str(label).rpartition("####")[2].strip()
    return last_boxed(text) or text


@lru_cache(maxsize=1024)  # the samples of a group share their label
def _parse_gold(gold: str) -> list[Any]:
    return parse(f"\\boxed{{{gold}}}", raise_on_error=True) or parse(gold, raise_on_error=True)
