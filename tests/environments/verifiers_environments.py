"""Environments of the package verifiers, such as its users write."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset

QUESTIONS = [("2 + 2?", "4"), ("3 + 4?", "7"), ("1 + 1?", "2")]


def dataset(count: int = 3) -> Dataset:
    rows = [
        {"prompt": [{"role": "user", "content": question}], "answer": answer, "info": {"number": i}}
        for i, (question, answer) in enumerate(QUESTIONS[:count])
    ]
    return Dataset.from_list(rows)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


async def right(completion: list[Any], answer: str) -> float:
    return float(completion[-1].content == answer)


def brevity(completion: list[Any], info: dict[str, Any]) -> float:
    assert info["number"] in range(len(QUESTIONS))
    return 1 / len(completion)


def adding(count: int = 3, max_turns: int = 4) -> vf.Environment:
    """The policy may call a tool; half of the reward is for few messages."""
    rubric = vf.Rubric(funcs=[right, brevity], weights=[1.0, 0.5])
    return vf.ToolEnv(dataset=dataset(count), tools=[add], max_turns=max_turns, rubric=rubric)


class Guessing(vf.MultiTurnEnv):
    """Says whether the answer was right, with a reward for each step; ``how`` it goes on."""

    def __init__(self, how: str) -> None:
        super().__init__(dataset=dataset(), eval_dataset=dataset(1), max_turns=3, rubric=vf.Rubric(funcs=[right]))
        self.how = how

    async def add_trajectory_step(self, state: Any, trajectory_step: Any) -> None:
        said = trajectory_step["completion"][-1].content
        trajectory_step["reward"] = 1.0 if said == state["answer"] else -0.25
        if self.how == "asks for more":
            state["sampling_args"] = {"temperature": 0.1}
        await super().add_trajectory_step(state, trajectory_step)

    @vf.stop
    async def solved(self, state: Any) -> bool:
        steps = state["trajectory"]
        return bool(steps) and steps[-1]["reward"] == 1.0

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        if self.how == "raises":
            raise vf.ToolError("no network")
        return [{"role": "user", "content": "No. Again." if self.how != "is long" else "No. " * 5000}]

    async def get_prompt_messages(self, state: Any) -> Any:
        if self.how == "forgets" and state["trajectory"]:
            return [*state["prompt"], {"role": "user", "content": f"Try {len(state['trajectory'])}."}]
        return await super().get_prompt_messages(state)


def guessing(how: str = "") -> vf.Environment:
    return Guessing(how)


def best_first(completions: list[Any]) -> list[float]:
    return [0.0 for _ in completions]


def comparing() -> vf.Environment:
    return vf.SingleTurnEnv(dataset=dataset(), rubric=vf.Rubric(funcs=[best_first]))


def broken() -> vf.Environment:
    raise OSError("no data")
