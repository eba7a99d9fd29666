from __future__ import annotations

from typing import Any

import pytest

from miles_spmd.rewards.exact import exact


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("19", "19", 1),
        (" one\n\thundred ", "one hundred", 1),
        ("19", 19, 1),
        ("19.0", 19, 0),
        ("19.", "19", 0),
        ("Paris", "paris", 0),
        ("onehundred", "one hundred", 0),
        ("two", ["2", "two"], 1),
        ("2", [2, "two"], 1),
        ("three", ["2", "two"], 0),
        ("", "", 1),
        ("naïve", "naïve", 1),
    ],
)
def test_table(text: str, label: Any, expected: float) -> None:
    assert exact(text, label) == expected


@pytest.mark.parametrize("label", [None, [], [None], {"answer": 1}])
def test_no_label(label: Any) -> None:
    with pytest.raises(ValueError, match="neither a string"):
        exact("19", label)
