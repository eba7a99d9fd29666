from __future__ import annotations

from typing import Any

import pytest

from miles_spmd.rewards.labels import last_boxed
from miles_spmd.rewards.math import math
from tests.rewards.equivalence import CASES, Label, Response

RIGHT: list[tuple[str, Any]] = [
    (r"so it is \boxed{19}", 19),
    (r"\boxed{19}", "19"),
    (r"\boxed{19}", 19.0),
    (r"\boxed{19.0}", 19),
    (r"first \boxed{3}, no: \boxed{19}", 19),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{\dfrac{2}{4}}", "1/2"),
    (r"\boxed{1/2}", 0.5),
    (r"\boxed{1,234}", 1234),
    (r"\boxed{-7}", -7),
    (r"\boxed{x=3}", "3"),
    (r"\boxed{12 \text{ apples}}", 12),
    (r"\boxed{\{2,1\}}", r"\{1,2\}"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\text{blue}}", r"\text{blue}"),
    (r"\boxed{10000000000000000}", 1e16),
    (r"\boxed{18}", "She makes 9 * 2 = $18 a day.\n#### 18"),
    ("The answer is 18.", "#### 18"),
    ("7 + 12 = 19", 19),
    ("it costs $1,234.50", "1234.5"),
    (r"so $\frac{1}{2}$ it is", "0.5"),
    ("19", r"\boxed{19}"),
    ("x" * 100_000 + " 19", 19),
]
WRONG: list[tuple[str, Any]] = [
    (r"\boxed{18}", 19),
    (r"\boxed{19} \boxed{18}", 19),
    (r"19, that is \boxed{18}", 19),
    (r"\boxed{}", 19),
    (r"\boxed{19", 20),
    ("", 19),
    ("no number", 19),
    ("19 or 20", 19),
    (r"\boxed{0.33}", "1/3"),
    (r"\boxed{\frac{1}{0}}", 19),
    (r"\boxed{\frac{}{}}", 19),
    (r"\boxed{" + "9" * 5000 + "}", 19),
    (r"\boxed{" + "(" * 5000 + "}", 19),
    ("\\boxed{" * 3000, 19),
    (r"\boxed{\mathbb{\\}}", 19),
    ("\x00\ud7ff \\boxed{\x00}", 19),
]


@pytest.mark.parametrize(("text", "label"), RIGHT, ids=lambda v: str(v)[:30])
def test_right(text: str, label: Any) -> None:
    assert math(text, label) == 1.0


@pytest.mark.parametrize(("text", "label"), WRONG, ids=lambda v: repr(v)[:30])
def test_wrong(text: str, label: Any) -> None:
    assert math(text, label) == 0.0


@pytest.mark.parametrize(("label", "kind"), [(one, kind) for kind, labels in CASES.items() for one in labels])
def test_notation(label: Label, kind: str) -> None:
    for expected, answers in ((1.0, label.right), (0.0, label.wrong)):
        for answer in answers:
            text = answer if isinstance(answer, Response) else f"so it is \\boxed{{{answer}}}"
            assert math(text, label.value) == expected, (kind, label.value, answer)


WITHOUT_BOX = ["{}", "We add them.\n{}", "The answer is {}.", "Answer: {}", "<answer>{}</answer>", "`{}`"]
AMBIGUOUS = {"1/2 cm 3"}  # outside a box this ends with a number and a unit


@pytest.mark.parametrize(("label", "kind"), [(one, kind) for kind, labels in CASES.items() for one in labels])
def test_an_answer_needs_no_box(label: Label, kind: str) -> None:
    for expected, answers in ((1.0, label.right[:2]), (0.0, label.wrong[:2])):
        for answer in answers:
            if not isinstance(answer, Response) and answer not in AMBIGUOUS:
                for form in WITHOUT_BOX:
                    assert math(form.format(answer), label.value) == expected, (kind, label.value, form, answer)


@pytest.mark.parametrize("label", [None, True, ["19"], {"a": 1}])
def test_labels_that_are_none(label: Any) -> None:
    with pytest.raises(ValueError, match="neither a string nor a number"):
        math(r"\boxed{19}", label)


def test_last_boxed_balances_braces() -> None:
    assert last_boxed(r"\boxed{\frac{a}{b}} then \boxed{c") == r"\frac{a}{b}"
    assert last_boxed(r"\boxed{1} \fbox{2}") == "2"
    assert last_boxed(r"\boxed{\{1, 2\}} and \{") == r"\{1, 2\}"
    assert last_boxed(r"\boxed{a \} b}") == r"a \} b"
    assert last_boxed("} { \\boxed{5}") == "5"
    assert last_boxed("none") is None
