"""Tasks of reasoning-gym, written and scored by the real package where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.rewards import reasoning_gym as ours
from miles_spmd.types.sample import Sample
from tests.rewards.test_pool import group

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None


def sample_of_row(row: dict[str, Any], text: str) -> Sample:
    return group(text, label=row["label"], **{ours.COLUMN: row[ours.COLUMN]})[0]


def test_rows_are_scored(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    path = tmp_path / "tasks.jsonl"
    tasks = ["leg_counting", "prime_factorization", "rearc"]  # whose item changes on its way through JSON
    ours.main([str(path), *tasks, "--count", "9", "--seed", "3"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row[ours.COLUMN]["task"] for row in rows] == tasks * 3
    assert len({row["prompt"][0]["content"] for row in rows}) == 9
    assert rows == [json.loads(json.dumps(row)) for row in ours.rows(tasks, 9, 3)]
    for row in rows:
        right = f"<answer>1</answer> or rather <answer> {row['label']} </answer>"
        assert ours.reasoning_gym(sample_of_row(row, right)) == {"score": 1.0, "unreadable": 0.0}
        assert ours.reasoning_gym(sample_of_row(row, row["label"]))["score"] == 1.0
    assert ours.reasoning_gym(sample_of_row(rows[0], r"\boxed{-1}"))["score"] == 0.0
    assert ours.reasoning_gym(sample_of_row(rows[1], "nonsense")) == {"score": 0.0, "unreadable": 1.0}


def test_questions_of_another_file_are_left_out(tmp_path: Path) -> None:
    """The item ``i`` of a seed may be the item ``i + 1`` of the seed before it."""
    pytest.importorskip("reasoning_gym")
    held_out, training = tmp_path / "heldout.jsonl", tmp_path / "training.jsonl"
    sums = ["chain_sum", "--options", '{"min_terms": 2, "max_terms": 2, "max_digits": 1}', "--instruction", ""]
    ours.main([str(held_out), *sums, "--count", "20", "--seed", "1"])
    ours.main([str(training), *sums, "--count", "50", "--without", str(held_out)])
    assert len(training.read_text().splitlines()) == 50
    assert not ours.questions(held_out) & ours.questions(training)
    (prompt,) = json.loads(training.read_text().splitlines()[0])["prompt"]
    assert prompt["content"] in ours.questions(training)
    with pytest.raises(SystemExit, match="of 100 questions only 0 are others than those that are left out"):
        ours.main([str(tmp_path / "x.jsonl"), *sums, "--count", "1", "--without", str(everything(tmp_path, sums))])
    with pytest.raises(SystemExit, match="absent is not a file that this program has written"):
        ours.main([str(tmp_path / "x.jsonl"), *sums, "--without", str(tmp_path / "absent")])


def everything(folder: Path, sums: list[str]) -> Path:
    """The questions that the first hundred items have."""
    ours.main([str(folder / "all.jsonl"), *sums, "--count", "100"])
    return folder / "all.jsonl"


def test_rows_of_another_version(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    (row,) = ours.rows(["leg_counting"], 1)
    row[ours.COLUMN]["question"] = "How many?"
    with pytest.raises(ValueError, match="another version of reasoning-gym: item 0 of 'leg_counting'"):
        ours.reasoning_gym(sample_of_row(row, "1"))
    for arguments, problem in (["legs"], "task 'legs': "), (["leg_counting", "--options", '{"a": 1}'], "'a'"):
        with pytest.raises(SystemExit, match=problem):
            ours.main([str(tmp_path / "x.jsonl"), *arguments])


def test_other_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="the row has no column 'reasoning_gym' as"):
        ours.reasoning_gym(group("19")[0])


@pytest.mark.skipif(INSTALLED, reason="the package is installed")
def test_without_the_package(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"pip install .miles-spmd\[reasoning-gym\]"):
        ours.main([str(tmp_path / "x.jsonl"), "leg_counting"])
