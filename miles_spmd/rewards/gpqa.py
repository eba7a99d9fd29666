r"""The letter that a response to a multiple-choice question ends with."""

from __future__ import annotations

import re
from typing import Any

from miles_spmd.rewards.labels import choice_label, last_boxed

_WRAPPED = r"(?:[*_$(\[{\s]|\\(?:text|mathbf|mathrm|boxed)\{)*"  # Markdown, LaTeX or brackets before a letter
_STATED = re.compile(
    rf"\b(?:answer|option|choice)\b(?:\s+(?:is|letter|option|choice))*\s*[:=]?{_WRAPPED}([A-Z])(?![\w'])", re.IGNORECASE
)
_ALONE = re.compile(rf"^{_WRAPPED}([A-Z])(?:[)\].:]|\W*$)")


def gpqa(text: str, label: Any) -> float:
    r"""Return 1.0 if the letter that ``text`` chooses is the label's, else 0.0.

    It is the letter in the last ``\boxed{...}``, else after the last "answer:", "the answer is", "option" or the like,
    else the one with which the last line begins, alone or before ``)``, ``.`` or ``:``. The label is a letter, also as
    ``(B)``, or the number of the choice from 0. Raises ValueError for any other label.
    """
    return float(chosen(text) == choice_label(label))


def chosen(text: str) -> str | None:
    """Return the capital letter that a response chooses, None if it chooses none."""
    boxed = last_boxed(text)
    if boxed is not None and (found := _ALONE.match(boxed.strip())):
        return found[1]
    if stated := [letter for letter in _STATED.findall(text) if letter.isupper()]:
        return stated[-1]
    found = _ALONE.match(text.strip().rpartition("\n")[2].strip())
    return found[1] if found else None
