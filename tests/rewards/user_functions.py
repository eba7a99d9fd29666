"""Reward functions such as users write, good and bad; named by ``module:function`` in the tests."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import time
from typing import Any

from miles_spmd.types.sample import Sample


def length(sample: Sample) -> float:
    return float(len(sample.text))


def detailed(sample: Sample) -> dict[str, Any]:
    return {"score": sample.index, "words": 2, "right": True, "why": "text is not kept"}


def by_turn(sample: Sample) -> dict[str, Any]:
    """A reward for each turn: the number of its tokens. Their sum is the score."""
    return {"turn_rewards": [len(segment.tokens) for segment in sample.trajectory.segments if segment.sampled]}


def by_turn_and_whole(sample: Sample) -> dict[str, Any]:
    return by_turn(sample) | {"score": 10}


def by_too_few_turns(sample: Sample) -> dict[str, Any]:
    return {"turn_rewards": by_turn(sample)["turn_rewards"][1:]}


def by_turn_not_finite(sample: Sample) -> dict[str, Any]:
    return {"turn_rewards": [math.nan] * sample.turns}


def ranked(samples: list[Sample]) -> list[float]:
    order = sorted(samples, key=lambda s: len(s.text))
    return [float(order.index(s)) for s in samples]


async def length_async(sample: Sample) -> float:
    await asyncio.sleep(0.5)
    return float(len(sample.text))


async def ranked_async(samples: list[Sample]) -> list[float]:
    await asyncio.sleep(0)
    return ranked(samples)


class Judge:
    async def __call__(self, sample: Sample) -> float:
        return sample.index * 2.0


judge = Judge()


def trl_reference(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """As in TRL's documentation: completions against a column of the dataset."""
    assert len(prompts) == len(completions) == len(kwargs["completion_ids"])
    return [1.0 if c == a else 0.0 for c, a in zip(completions, answer)]


def trl_conversational(completions: list[list[dict[str, str]]], prompts: list[Any], label: list[Any]) -> list[float]:
    assert prompts[0][-1]["role"] == "user"
    return [float(c[0]["content"] == str(a)) for c, a in zip(completions, label)]


def trl_turns(completions: list[list[dict[str, str]]], prompts: list[Any]) -> list[float]:
    """Number of messages behind the prompt, of which the first calls a tool."""
    assert all(c[0]["role"] == "assistant" for c in completions)
    return [float(len(c)) for c in completions]


async def trl_async(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def trl_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def trl_logging(completions: list[str], label: list[str], log_extra: Any, log_metric: Any = None) -> list[float]:
    rewards = [float(text == right) for text, right in zip(completions, label)]
    log_extra("right", label)
    log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


async def trl_logging_async(completions: list[str], label: list[str], log_metric: Any, log_extra: Any) -> list[float]:
    return trl_logging(completions, label, log_extra, log_metric)


def trl_task_math(completions: list[str], task: list[str], **kwargs: Any) -> list[float | None]:
    return [float(len(text)) if one == "math" else None for text, one in zip(completions, task)]


def trl_task_code(completions: list[str], task: list[str], **kwargs: Any) -> list[float | None]:
    return [float(len(text)) if one == "code" else None for text, one in zip(completions, task)]


def verl_group(data_sources: list[str], solution_strs: list[str], ground_truths: list[str], extra_infos: Any) -> Any:
    rows = zip(solution_strs, ground_truths, extra_infos, strict=True)
    return [float(text == right) + extra["index"] for text, right, extra in rows]


def verl_full(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
    return {"score": float(solution_str == ground_truth), "gsm8k": data_source == "gsm8k", "extra": extra_info["index"]}


def verl_short(solution_str: str, ground_truth: str, method: str = "strict") -> float:
    assert method == "strict"
    return float(solution_str == ground_truth)


def raises(sample: Sample) -> float:
    if sample.index == 1:
        raise KeyError("no such thing")
    return 0.0


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__

    def __float__(self) -> float:
        raise self


def raises_unspeakably(sample: Sample) -> float:
    raise Unspeakable


def unspeakable(sample: Sample) -> Any:
    return Unspeakable()


def enormous(sample: Sample) -> int:
    return 10**400


def detail_is_enormous(sample: Sample) -> dict[str, float]:
    return {"score": 1.0, "right": 10**400}


def detail_has_no_name(sample: Sample) -> dict[str, float]:
    return {"score": 1.0, "\x1b[31m": 1.0}


def hangs(sample: Sample) -> float:
    while sample.index == 1:
        time.sleep(60)
    return 0.0


async def hangs_async(sample: Sample) -> float:
    await asyncio.sleep(60 if sample.index == 1 else 0)
    return 0.0


async def blocks_async(sample: Sample) -> float:
    time.sleep(60)
    return 0.0


def nan(sample: Sample) -> float:
    return math.nan


def infinite(sample: Sample) -> float:
    return math.inf


def none(sample: Sample) -> None:
    return None


def text(sample: Sample) -> str:
    return "1.0"


def scoreless(sample: Sample) -> dict[str, float]:
    return {"reward": 1.0}


def too_few(samples: list[Sample]) -> list[float]:
    return [1.0]


def one_number(samples: list[Sample]) -> float:
    return 1.0


def trl_none(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None] * len(completions)


def trl_state(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    """A reward that changes in the course of the run."""
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)


async def trl_state_async(completions: list[str], trainer_state: Any) -> list[float]:
    return trl_state(completions, trainer_state)


def trl_state_of_transformers(completions: list[str], trainer_state: Any) -> list[float]:
    return [trainer_state.epoch] * len(completions)


def trl_environments(completions: list[str], environments: list[Any]) -> list[float]:
    return [environment.score for environment in environments]


def trl_missing_column(completions: list[str], solution: list[str]) -> list[float]:
    return [0.0] * len(completions)


def eats_memory(sample: Sample) -> float:
    return float(len(bytearray(3 * 2**30)))


def exits(sample: Sample) -> float:
    os._exit(7)


def stopped_by_signal(sample: Sample) -> float:
    os.kill(os.getpid(), 11)
    time.sleep(10)
    return 0.0


def exits_politely(sample: Sample) -> float:
    sys.exit(3)


async def exits_politely_async(sample: Sample) -> float:
    sys.exit(3)


def exits_politely_as_group(samples: list[Sample]) -> list[float]:
    sys.exit()


def exits_without_error(sample: Sample) -> float:
    os._exit(0)


def kills_itself(sample: Sample) -> float:
    os.kill(os.getpid(), 9)
    return 0.0


def leaves_a_fork(sample: Sample) -> float:
    if not os.fork():
        time.sleep(5)
    os._exit(4)


def starts_a_program(sample: Sample) -> float:
    subprocess.run(["sleep", "6173"], check=True)
    return 0.0


def escapes(sample: Sample) -> float:
    print("\033[31m printed")
    raise ValueError("\033[31m" + "red" * 10_000)


def environment(sample: Sample) -> dict[str, float]:
    return {"score": 0.0} | {name: float(name in os.environ) for name in sample.prompt.metadata["names"]}


def too_many(sample: Sample, other: int) -> float:
    return 0.0


def loaded_torch(sample: Sample) -> float:
    return float("torch" in sys.modules)


def process_id(sample: Sample) -> float:
    return float(os.getpid())


async def process_id_async(sample: Sample) -> float:
    return float(os.getpid())


def process_ids(samples: list[Sample]) -> list[float]:
    return [float(os.getpid())] * len(samples)


not_a_function = 3
