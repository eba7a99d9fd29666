"""The quickstart's models and data, the same bytes each time: ``python -m miles_spmd.quickstart.assets FOLDER``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from miles_spmd.quickstart import calculator, programs, retrieval, stones, task
from miles_spmd.quickstart.checkpoint import write_random_model, write_tokenizer
from miles_spmd.quickstart.language import Language
from miles_spmd.types.files import write_whole

SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS = 8192, 4096, 400


class Task(NamedTuple):
    language: Language
    data_files: Callable[[], dict[str, list[dict[str, Any]]]]  # the rows of each file by its name


SUMS = "sums"
TASKS = {
    SUMS: Task(task.LANGUAGE, partial(task.data_files, SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS)),
    "calculator": Task(calculator.LANGUAGE, calculator.data_files),
    "programs": Task(programs.LANGUAGE, programs.data_files),
    "retrieval": Task(retrieval.LANGUAGE, retrieval.data_files),
    "stones": Task(stones.LANGUAGE, stones.data_files),
}


def build_assets(folder: Path, seed: int = 0, name: str = SUMS) -> None:
    """Write ``model/`` (random weights, tokenizer) and the data files of the task ``name`` into ``folder``.

    ``seed`` determines the weights; the data files never depend on it.
    """
    language, data_files = TASKS[name]
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_tokenizer(model, language)
    write_random_model(model, language, seed)
    for file, rows in data_files().items():
        write_whole(folder / file, "".join(json.dumps(row) + "\n" for row in rows).encode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m miles_spmd.quickstart.assets", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--task", choices=TASKS, default=SUMS)
    arguments = parser.parse_args()
    build_assets(arguments.folder, arguments.seed, arguments.task)


if __name__ == "__main__":
    main()
