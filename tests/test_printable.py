"""Text of models and reward functions on a terminal."""

from __future__ import annotations

import pytest

from miles_spmd.types.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x00\x9b31m", r"a\x0db\x00\x9b31m"),
        ("\u202eevil\u2069", r"\u202eevil\u2069"),
        ("\ud800", r"\ud800"),
        ("größer 数学 👩\u200d🏫", "größer 数学 👩\u200d🏫"),
        ("x" * 30, "xxxxx [... 20 characters left out ...] xxxxx"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text, 24 if len(text) < 30 else 10) == shown
