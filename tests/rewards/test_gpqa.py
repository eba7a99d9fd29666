"""``gpqa``: which letter a response chooses."""

from __future__ import annotations

import itertools

import pytest

from miles_spmd.rewards.gpqa import chosen, gpqa


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *((form, "B") for form in ("B", "(B)", "B.", "**B**", "B)", "\\boxed{B}", "\\boxed{(B) Paris}")),
        *((f"A and C are wrong. {form}", "B") for form in ("Answer: B", "**Answer:** B", "The correct answer is (B).")),
        *((f"Thus\n{form}", "B") for form in ("The answer is **B**", "Final answer: $B$", "I choose option B", "B: x")),
        ("$\\boxed{\\text{B}}$", "B"),
        ("The answer is option B.", "B"),
        ("Answer: A\nWait.\nAnswer: B", "B"),
        ("Answer: A\n\\boxed{B}", "B"),
        ("\\boxed{7}\nAnswer: B", "B"),
        ("A or C\n(B) Paris", "B"),
        ("The answer is a cat.", None),
        ("A cat sat.", None),
        ("Because of that", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_letter(text: str, letter: str | None) -> None:
    assert chosen(text) == letter


def test_every_letter_is_told_from_every_other() -> None:
    for letter, label in itertools.product("ABCDEFGHIJ", repeat=2):
        expected = float(letter == label)
        assert gpqa(f"Answer: {letter}", label) == gpqa(f"({letter})", f"({label.lower()})") == expected
        assert gpqa(f"\\boxed{{{letter}}}", "ABCDEFGHIJ".index(label)) == expected
