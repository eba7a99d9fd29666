"""``f1``: values computed by hand from the definition; the definition itself was compared with torchmetrics' SQuAD."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spmd.rewards.f1 import f1, tokens


@pytest.mark.parametrize(
    ("text", "label", "score", "equal"),
    [
        ("Paris", "paris", 1, 1),
        ("The Paris.", "Paris", 1, 1),
        ("in Paris", "Paris", Fraction(2, 3), 0),
        ("the city of Paris, France", ["Paris", "Paris, France"], Fraction(2 * 2, 4 + 2), 0),
        ("Paris Paris", "Paris", Fraction(2, 3), 0),  # a word counts as often as both have it
        ("Paris", "London", 0, 0),
        ("U.S.", "us", 1, 1),
        ("anthem", "them", 0, 0),  # an is an article only where it is a word
        ("1,000", 1000, 1, 1),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("something", "", 0, 0),
        ("", "something", 0, 0),
        ("I think <answer>London</answer>, no: <answer> Paris </answer>", "Paris", 1, 1),
        (r"So it is \boxed{Paris}.", "Paris", 1, 1),
    ],
)
def test_scores(text: str, label: Any, score: float, equal: float) -> None:
    assert f1(text, label) == {"score": pytest.approx(float(score)), "exact": equal}


words = st.lists(st.sampled_from(["cat", "dog", "the", "fish"]), max_size=8)


@given(words, words)
def test_it_is_the_harmonic_mean_of_precision_and_recall(found: Sequence[str], wanted: Sequence[str]) -> None:
    answer, label = tokens(" ".join(found)), tokens(" ".join(wanted))
    left, shared = list(label), 0
    for word in answer:
        if word in left:
            left.remove(word)
            shared += 1
    expected = float(answer == label)
    if shared:
        precision, recall = Fraction(shared, len(answer)), Fraction(shared, len(label))
        expected = float(2 * precision * recall / (precision + recall))
    assert f1(" ".join(found), " ".join(wanted))["score"] == pytest.approx(expected)
