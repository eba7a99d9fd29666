"""Token F1 and exact match of an answer to a question, as SQuAD's evaluation defines them (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from miles_spmd.rewards.labels import exact_labels, last_boxed

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1(text: str, label: Any) -> dict[str, float]:
    r"""Return the best F1 between the answer's tokens and those of the labels as ``score``, and whether the answer
    equals a label as ``exact``.

    The answer is the content of the last ``<answer>...</answer>``, else of the last ``\boxed{...}``, else the whole
    text. Case, punctuation and the articles a, an and the do not count. The label is a string or number, or a list of
    these. Raises ValueError for any other label.
    """
    tagged = _ANSWER.findall(text)
    boxed = last_boxed(text)
    answer = tokens(tagged[-1] if tagged else text if boxed is None else boxed)
    wanted = [tokens(one) for one in exact_labels(label)]
    return {"score": max(_f1(answer, one) for one in wanted), "exact": float(answer in wanted)}


def tokens(text: str) -> list[str]:
    """Return the words that count."""
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(answer: list[str], wanted: list[str]) -> float:
    if not answer or not wanted:  # a question without an answer has an empty label
        return float(answer == wanted)
    shared = sum((Counter(answer) & Counter(wanted)).values())
    return 2 * shared / (len(answer) + len(wanted))
