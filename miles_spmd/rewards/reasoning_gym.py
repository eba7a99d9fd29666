"""Tasks of reasoning-gym as a dataset, and its verifiers as a reward. Requires the package ``reasoning-gym``.

python -m miles_spmd.rewards.reasoning_gym tasks.jsonl leg_counting chain_sum --count 1000
python -m miles_spmd.rewards.reasoning_gym heldout.jsonl leg_counting chain_sum --seed 1 --without tasks.jsonl
miles-spmd train ... data.prompt_data=tasks.jsonl reward.rm_type=miles_spmd.rewards.reasoning_gym:reasoning_gym
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import count as numbers
from pathlib import Path
from typing import Any

import msgspec

from miles_spmd.rewards.labels import last_boxed
from miles_spmd.types.files import with_remedy
from miles_spmd.types.sample import Sample

SIZE = 1_000_000  # items of a task's dataset, unless the options have a size; an item is a function of seed and index
TRIES = 100  # questions that are looked at for each row that is wanted
COLUMN = "reasoning_gym"
INSTRUCTION = "Think step by step, and write the final result between <answer> and </answer>."
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Origin(msgspec.Struct, frozen=True):
    """Where an item comes from, from which the verifier gets it again: some are not what they were once they have been
    JSON."""

    task: str
    index: int
    seed: int
    options: dict[str, Any] = {}


def rows(
    tasks: Sequence[str],
    count: int,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    instruction: str = INSTRUCTION,
    without: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield ``count`` rows, with the ``tasks`` in turns. ``options``: configuration of each task's dataset;
    ``instruction``: what follows the question in the prompt; ``without``: questions that are left out.

    Raises ValueError for an unknown task, one that is named twice, for options that it does not have, and where nearly
    all questions of the tasks are left out."""
    if twice := [task for task, times in Counter(tasks).items() if times > 1]:
        raise ValueError(f"the task {twice[0]!r} is named twice, which would give each of its items twice")
    left, tries = count, count * TRIES
    for number in numbers():
        if not left:
            return
        if number == tries:
            raise ValueError(f"of {tries} questions only {count - left} are others than those that are left out")
        origin = Origin(tasks[number % len(tasks)], number // len(tasks), seed, dict(options or {}))
        item = _item(origin)
        if item["question"] in without:
            continue
        left -= 1
        yield {
            "prompt": [{"role": "user", "content": f"{item['question'].strip()}\n\n{instruction}".strip()}],
            "label": item["answer"],
            COLUMN: {**msgspec.to_builtins(origin), "question": item["question"]},
        }


def questions(file: Path) -> set[str]:
    """Return the questions of a file of :func:`rows`. Raises ValueError where it cannot be read as one."""
    try:
        lines = file.read_bytes().splitlines()
        return {msgspec.json.decode(line)[COLUMN]["question"] for line in lines}
    except (OSError, LookupError, TypeError, msgspec.DecodeError) as error:
        raise ValueError(f"{file} is not a file that this program has written: {error}") from error


def reasoning_gym(sample: Sample) -> dict[str, float]:
    r"""Return what the task's verifier gives the content of the last ``<answer>...</answer>``, else of the last
    ``\boxed{...}``, else the whole response. ``unreadable`` is 1 where the verifier raised, and the score is then 0.

    Raises ValueError for a row that was not written by :func:`rows`, or by another version of reasoning-gym.
    """
    try:
        given = sample.prompt.metadata[COLUMN]
        origin, question = msgspec.convert(given, Origin), given["question"]
    except (LookupError, msgspec.ValidationError) as error:
        raise ValueError(
            f"the row has no column {COLUMN!r} as `python -m miles_spmd.rewards.reasoning_gym` writes it: {error}"
        ) from error
    item = _item(origin)
    if item["question"] != question:
        raise ValueError(
            f"the file was written with another version of reasoning-gym: item {origin.index} of {origin.task!r} has "
            "another question now; write the file again"
        )
    tagged = _TAGGED.findall(sample.text)
    found = tagged[-1] if tagged else last_boxed(sample.text)
    try:
        score = _dataset(origin.task, origin.seed, _key(origin)).score_answer(
            (sample.text if found is None else found).strip(), item
        )
    except Exception:  # some verifiers raise for a text that they cannot read
        return {"score": 0.0, "unreadable": 1.0}
    return {"score": float(score), "unreadable": 0.0}


def _item(origin: Origin) -> dict[str, Any]:
    item: dict[str, Any] = _dataset(origin.task, origin.seed, _key(origin))[origin.index]
    return item


def _key(origin: Origin) -> bytes:
    return msgspec.json.encode(origin.options, order="deterministic")


@cache
def _dataset(task: str, seed: int, options: bytes) -> Any:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ValueError(
            f"reasoning-gym cannot be imported ({error}): pip install 'miles-spmd[reasoning-gym]'"
        ) from error
    try:
        return create_dataset(task, **{"seed": seed, "size": SIZE} | msgspec.json.decode(options))
    except (AssertionError, TypeError, ValueError) as error:  # what configurations raise
        raise ValueError(f"task {task!r}: {error}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a JSON-lines file. Ends with the message of a ValueError or OSError."""
    parser = argparse.ArgumentParser(prog="python -m miles_spmd.rewards.reasoning_gym")
    parser.add_argument("file", type=Path, help="JSON-lines file to write")
    parser.add_argument("tasks", nargs="+", help="names of tasks, such as leg_counting")
    parser.add_argument("--count", type=_count, default=1000, help="number of rows")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks")
    parser.add_argument(
        "--options", default="{}", help="configuration of the tasks as JSON, such as '{\"min_animals\": 2}'"
    )
    parser.add_argument("--instruction", default=INSTRUCTION, help="what follows the question; '' for nothing")
    parser.add_argument("--without", type=Path, help="file of such rows whose questions are left out")
    given = parser.parse_args(arguments)
    try:
        options = msgspec.json.decode(given.options, type=dict)
        known = questions(given.without) if given.without else ()
        chosen = rows(given.tasks, given.count, given.seed, options, given.instruction, known)
        lines = [msgspec.json.encode(row) + b"\n" for row in chosen]
        given.file.parent.mkdir(parents=True, exist_ok=True)
        given.file.write_bytes(b"".join(lines))
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {with_remedy(str(error))}")
    print(f"{given.file}: {len(lines)} rows")


if __name__ == "__main__":
    main()
