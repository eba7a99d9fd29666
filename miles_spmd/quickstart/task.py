"""The quickstart's task: sums of three digits, written in digits and words, answered in whichever is asked for.

    seven plus 2 plus four in digits -> 13
    7 plus two plus 4 in words       -> thirteen

*Split.* A problem is three operands, whatever their order. Of the 220 problems 33 form the held-out set: no prompt of
the training files has those operands, in any order or notation, so a right answer there cannot have been memorised. The
four problems that are alone with their sum (0, 1, 26, 27) stay in training, as no model could learn such an answer
otherwise. No two of sft.jsonl, train.jsonl and heldout.jsonl share a prompt.

*Warm-up.* The answers that supervised learning imitates are careless on purpose: in most sums from ten to nineteen the
ten is forgotten (`3` for `13`). A model that imitates them well is therefore right in about a third of its greedy
answers, while the right answer is among a few sampled ones. Reinforcement learning gets the questions and a reward for
exact matches only, and has to find out what the demonstrations did wrong.

*Preferences.* The preference files have the questions of train.jsonl and heldout.jsonl once more, each with its right
answer and a wrong one: the careless answer where the demonstrations give that, else a number next to the right one.

Everything here is a pure function of its arguments: no state, no random generator, the same rows everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple

from miles_spmd.quickstart.language import Language
from miles_spmd.types.seeds import derive_seed

OPERANDS = range(10)
TERMS = 3
LARGEST_SUM = TERMS * max(OPERANDS)
HELD_OUT_PROBLEMS = 33
CARELESS_PERCENT = 70
SPLIT = "held out"  # the salt of the split: the data files depend on every character of it

UP_TO_NINETEEN = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
LANGUAGE = Language((" plus ", " in words", " in digits", *"0123456789", *UP_TO_NINETEEN, "twenty", "twenty-"))


class Question(NamedTuple):
    operands: tuple[int, ...]
    in_words: tuple[bool, ...]  # how each operand is written
    answer_in_words: bool

    @property
    def prompt(self) -> str:
        terms = (UP_TO_NINETEEN[n] if words else str(n) for n, words in zip(self.operands, self.in_words))
        return " plus ".join(terms) + (" in words" if self.answer_in_words else " in digits")

    @property
    def answer(self) -> str:
        return self._write(sum(self.operands))

    @property
    def careless_answer(self) -> str:
        """The answer of the demonstrations: the same question always gets the same answer, right or wrong."""
        total = sum(self.operands)
        careless = derive_seed("careless", self.prompt) % 100 < CARELESS_PERCENT
        return self._write(total - 10 if careless and 10 <= total < 20 else total)

    @property
    def wrong_answer(self) -> str:
        """The rejected answer of a preference: the careless one if it is wrong, else the sum plus or minus one."""
        total, careless = sum(self.operands), self.careless_answer
        if careless != self.answer:
            return careless
        up = total == 0 or (total < LARGEST_SUM and derive_seed("near miss", self.prompt) % 2 == 0)
        return self._write(total + 1 if up else total - 1)

    def _write(self, number: int) -> str:
        return in_words(number) if self.answer_in_words else str(number)


def in_words(number: int) -> str:
    """Return ``number``, 0 to 29, in English words."""
    if number < 20:
        return UP_TO_NINETEEN[number]
    return "twenty" if number == 20 else f"twenty-{UP_TO_NINETEEN[number - 20]}"


def held_out_problems() -> frozenset[tuple[int, ...]]:
    """Return the held-out problems, operands in ascending order."""
    problems = list(combinations_with_replacement(OPERANDS, TERMS))
    with_sum = Counter(map(sum, problems))
    candidates = [p for p in problems if with_sum[sum(p)] > 1]
    shuffled = sorted(candidates, key=lambda p: derive_seed(SPLIT, *p))
    return frozenset(shuffled[:HELD_OUT_PROBLEMS])


def questions() -> Iterator[Question]:
    """Yield every question, 16 for each order of each problem."""
    for operands in product(OPERANDS, repeat=TERMS):
        for *notation, answer_in_words in product((False, True), repeat=TERMS + 1):
            yield Question(operands, tuple(notation), answer_in_words)


def data_files(sft_rows: int, train_rows: int, heldout_rows: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file by its name: ``prompt`` and ``label`` (in ``sft`` the demonstrated answer), or
    ``prompt``, ``chosen`` and ``rejected``. Raises ValueError where there are not as many questions."""
    held_out = held_out_problems()
    shuffled = sorted(questions(), key=lambda q: derive_seed("order", q.prompt))
    known = [q for q in shuffled if tuple(sorted(q.operands)) not in held_out]
    unknown = [q for q in shuffled if tuple(sorted(q.operands)) in held_out]
    if sft_rows + train_rows > len(known) or heldout_rows > len(unknown):
        raise ValueError(f"there are only {len(known)} training and {len(unknown)} held-out questions")
    sft, train, heldout = known[:sft_rows], known[sft_rows : sft_rows + train_rows], unknown[:heldout_rows]
    return {
        "sft.jsonl": [{"prompt": q.prompt, "label": q.careless_answer} for q in sft],
        "train.jsonl": [{"prompt": q.prompt, "label": q.answer} for q in train],
        "heldout.jsonl": [{"prompt": q.prompt, "label": q.answer} for q in heldout],
        "preferences.jsonl": [_preference(q) for q in train],
        "heldout_preferences.jsonl": [_preference(q) for q in heldout],
    }


def _preference(question: Question) -> dict[str, Any]:
    return {"prompt": question.prompt, "chosen": question.answer, "rejected": question.wrong_answer}
