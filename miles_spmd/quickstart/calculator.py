"""A task for the environment ``tools``: sums, differences and products of two three-digit numbers, and a calculator.

    347 times 812
    <tool_call>{"name": "calculator", "arguments": {"expression": "347*812"}}</tool_call>
    281764
    281764

*Warm-up.* The conversations that supervised learning imitates use the calculator for all sums, but are careless with
differences and products: most of them say an estimate, the result rounded to hundreds, without a call. A model that
imitates them well is therefore right in about a third of its greedy responses. Reinforcement learning gets the
questions and a reward for the right result only, and has to find out when the tool is worth a call.

*Split.* No two of sft.jsonl, train.jsonl and heldout.jsonl share a prompt.
"""

from __future__ import annotations

import operator
import re
from itertools import count, islice
from typing import Any, NamedTuple

from miles_spmd.quickstart.language import Language
from miles_spmd.types.seeds import derive_seed

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SYMBOLS = {"plus": "+", "minus": "-", "times": "*"}
SMALLEST, LARGEST = 100, 999
CARELESS_PERCENT = 80
SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS = 8192, 2048, 200

LANGUAGE = Language(
    words=(
        *(f" {word} " for word in SYMBOLS),
        *"0123456789",
        *OPERATIONS,
        "calculator",
        *("<tool_call>\n", '{"name": "', '", "arguments": ', '{"expression": "', '"}}', "\n</tool_call>"),
    ),
    markers=("<|user|>", "<|assistant|>", "<|tools|>", "<|tool|>"),
)
TOOL = {"type": "function", "function": {"name": "calculator"}}  # the chat template shows the name alone


def calculator(expression: str) -> str:
    """Calculate the sum, the difference or the product of two integers.

    Args:
        expression: Such as 12+3, 12-3 or 12*3.
    """
    match = re.fullmatch(r"(\d{1,9})([-+*])(\d{1,9})", expression)
    if match is None:
        raise ValueError("not two integers with +, - or * between them")
    return str(OPERATIONS[match[2]](int(match[1]), int(match[3])))


class Question(NamedTuple):
    left: int
    operation: str  # a key of SYMBOLS
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left} {self.operation} {self.right}"

    @property
    def expression(self) -> str:
        return f"{self.left}{SYMBOLS[self.operation]}{self.right}"

    @property
    def demonstration(self) -> list[dict[str, Any]]:
        """The conversation of the warm-up: the same question always gets the same one, careful or careless."""
        user, result = {"role": "user", "content": self.prompt}, calculator(self.expression)
        if self.operation != "plus" and derive_seed("careless", self.prompt) % 100 < CARELESS_PERCENT:
            return [user, {"role": "assistant", "content": str(round(int(result), -2))}]
        function = {"name": "calculator", "arguments": {"expression": self.expression}}
        return [
            user,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": result},
        ]


def data_files() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file by its name: conversations with ``tools`` in ``sft``, else ``prompt`` and
    ``label``."""
    numbers = LARGEST - SMALLEST + 1
    seeds = (derive_seed("calculator", i) for i in count())
    all_questions = (
        Question(SMALLEST + s % numbers, tuple(SYMBOLS)[s // numbers % 3], SMALLEST + s // numbers // 3 % numbers)
        for s in seeds
    )
    distinct = dict.fromkeys(islice(all_questions, 2 * (SFT_ROWS + TRAIN_ROWS + HELDOUT_ROWS)))
    questions = iter(distinct)
    sft, train, heldout = (list(islice(questions, rows)) for rows in (SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS))
    return {
        "sft.jsonl": [{"prompt": q.demonstration, "tools": [TOOL]} for q in sft],
        "train.jsonl": [{"prompt": q.prompt, "label": calculator(q.expression)} for q in train],
        "heldout.jsonl": [{"prompt": q.prompt, "label": calculator(q.expression)} for q in heldout],
    }
