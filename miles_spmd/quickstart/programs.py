"""A task for the reward ``code``: a function of three steps, which a test in the sandbox calls.

    add 3, subtract 5, multiply by 4 -> def f(x):
                                            return (x + 3 - 5) * 4

*Warm-up.* The programs that supervised learning imitates are careless: most of them forget the parentheses. A model
that imitates them well is therefore right in few of its greedy responses. Reinforcement learning gets the descriptions
and the tests only.

*Split.* No two of sft.jsonl, train.jsonl and heldout.jsonl share a prompt.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from miles_spmd.quickstart.language import Language
from miles_spmd.types.seeds import derive_seed

SYMBOLS = {"add": "+", "subtract": "-", "multiply by": "*"}
NUMBERS = range(2, 10)
INPUT = 1000  # of the one call: f(x) = ax + b is right for all x if it is right here, since |b| < 500
CARELESS_PERCENT = 70
SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS = 3072, 1024, 100

BEGINNING = "def f(x):\n    return "
OPERATORS = tuple(f" {symbol} " for symbol in SYMBOLS.values())
LANGUAGE = Language((*(f"{verb} " for verb in SYMBOLS), ", ", *map(str, NUMBERS), BEGINNING, "x", *OPERATORS, "(", ")"))


class Step(NamedTuple):
    verb: str  # a key of SYMBOLS
    number: int


class Question(NamedTuple):
    steps: tuple[Step, ...]

    @property
    def prompt(self) -> str:
        return ", ".join(f"{verb} {number}" for verb, number in self.steps)

    @property
    def careless_program(self) -> str:
        """The program of the demonstrations: the same question always gets the same one, right or wrong."""
        return self._write(parentheses=derive_seed("careless", self.prompt) % 100 >= CARELESS_PERCENT)

    @property
    def tests(self) -> dict[str, Any]:
        """What the reward ``code`` reads."""
        return {"fn_name": "f", "inputs": [[INPUT]], "outputs": [self._value(INPUT)]}

    def _value(self, x: int) -> int:
        for verb, number in self.steps:
            x = {"add": x + number, "subtract": x - number, "multiply by": x * number}[verb]
        return x

    def _write(self, parentheses: bool) -> str:
        expression, is_sum = "x", False
        for verb, number in self.steps:
            multiplies = verb == "multiply by"
            if parentheses and multiplies and is_sum:
                expression = f"({expression})"
            expression, is_sum = f"{expression} {SYMBOLS[verb]} {number}", not multiplies
        return BEGINNING + expression


def data_files() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file by its name: ``prompt`` and ``label``, the program in ``sft``, else the tests."""
    steps = [Step(verb, number) for verb, number in product(SYMBOLS, NUMBERS)]
    last = [step for step in steps if step.verb == "multiply by"]
    questions = sorted(map(Question, product(steps, steps, last)), key=lambda q: derive_seed("programs", q.prompt))
    known = questions[HELDOUT_ROWS:]
    return {
        "sft.jsonl": [{"prompt": q.prompt, "label": q.careless_program} for q in known[:SFT_ROWS]],
        "train.jsonl": [{"prompt": q.prompt, "label": q.tests} for q in known[SFT_ROWS : SFT_ROWS + TRAIN_ROWS]],
        "heldout.jsonl": [{"prompt": q.prompt, "label": q.tests} for q in questions[:HELDOUT_ROWS]],
    }
