"""A run of two ranks with nearly all examples of docs/plugins.md at once."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import pstdev
from typing import Any, NamedTuple

import pytest

from tests.plugins.examples import EXAMPLES, write_modules
from tests.worker.launched import Launched
from tests.worker.tiny_run import write_checkpoint, write_config

RUN_SECONDS = 240  # generous: other tests may use the machine
IN_PROCESS = ("Tool", "Format of calls", "Reply of a judge")  # which a random model of 0.1 MB never writes


class Finished(NamedTuple):
    folder: Path
    metrics: list[dict[str, float]]
    samples: dict[int, list[dict[str, Any]]]  # by step

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("plugins")
    write_modules(folder)
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for title, one in EXAMPLES.items():
        for table, settings in one.settings.items():
            changes[table] |= settings if title not in IN_PROCESS else {}
    changes["rollout"] |= {"n_samples_per_prompt": 4, "rollout_max_response_len": 24}
    changes["run"] |= {"num_rollout": 2}
    config = write_config(folder, write_checkpoint(tmp_path_factory.mktemp("tiny")), **changes)
    run = Launched(folder, config)
    assert run.launcher.wait(RUN_SECONDS) == 0, run.report()
    metrics = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    samples = defaultdict(list)
    for line in (folder / "samples.jsonl").read_text().splitlines():
        samples[(row := json.loads(line))["step"]].append(row)
    yield Finished(folder, metrics, dict(samples))
    run.clean_up()


def steps(finished: Finished, name: str) -> list[float]:
    return [row[name] for row in finished.metrics if name in row]


def test_a_run_with_all_of_them(finished: Finished) -> None:
    assert len(steps(finished, "train/loss")) == 2
    assert steps(finished, "train/train_rollout_logprob_abs_diff") == [0, 0]
    assert min(steps(finished, "train/grad_norm")) > 0
    assert steps(finished, "rollout/dropped_groups")[0] >= 2  # of six groups four are chosen
    assert len(finished.samples) == 2
    for row in steps(finished, "rollout/fully_masked_samples"):
        assert row == 4 * 2  # the best and the worst of four samples are trained
    assert all(0 < best <= 1 for best in steps(finished, "rollout/best_responses"))
    assert all(kept > 0 for kept in steps(finished, "rollout/kept_tokens"))
    assert all(0 < share <= 1 for share in steps(finished, "rollout/env/second_attempts"))


def test_rows_curriculum_and_acceptance_of_the_run(finished: Finished) -> None:
    for step, rows in finished.samples.items():
        numbers = [int(row["uid"].removeprefix("my_rows:sums:").partition("+")[0]) for row in rows]
        assert all(count == 4 for count in Counter(row["uid"] for row in rows).values())
        sums = [sum(divmod(number - 1, 8)) for number in numbers]
        # among the 64 rows 6 have sums up to 2, and 15 up to 4; a filter may take others in the place of some
        in_order = [one for one, row in zip(sums, rows) if "+" not in row["uid"]]
        assert in_order == sorted(in_order)
        assert max(in_order) <= (2 if step == 0 else 4)


def test_rewards_of_the_run(finished: Finished) -> None:
    for step, rows in finished.samples.items():
        for row in rows:
            number = int(row["uid"].removeprefix("my_rows:sums:").partition("+")[0])
            label, text = str(sum(divmod(number - 1, 8))), row["text"]
            digits = sum(character.isdigit() for character in text) / max(len(text), 1)
            assert row["reward"] == pytest.approx((label in text) + digits)
        mean = sum(row["reward"] for row in rows) / len(rows)
        assert steps(finished, "rollout/raw_reward")[step] == pytest.approx(mean)
        rewards = [row["reward"] for row in rows]
        assert all(pstdev(rewards[start : start + 4]) > 0 for start in range(0, len(rows), 4))  # the filter of groups


def test_what_the_hooks_wrote(finished: Finished) -> None:
    requests = [json.loads(line) for line in (finished.folder / "requests.jsonl").read_text().splitlines()]
    assert len({request["rid"] for request in requests}) == len(requests) >= 2 * 6 * 4
    for rank in (0, 1):
        lines = (finished.folder / f"norms-{rank}.txt").read_text().splitlines()
        assert len(lines) == 2
        assert all(re.fullmatch(r"actor \S+\.weight \d\S*", line) for line in lines)


def test_what_evaluator_tracker_and_exporter_made(finished: Finished) -> None:
    assert len(steps(finished, "eval/sums-majority")) == 3
    assert all(1 <= distinct <= 4 for distinct in steps(finished, "eval/sums-distinct"))
    rows = list(csv.reader((finished.folder / "tiny.csv").open()))
    of_csv = [float(value) for _, name, value in rows if name == "train/loss"]
    assert of_csv == steps(finished, "train/loss")
    (sums,) = finished.run.glob("export-2.sha256")
    lines = dict(reversed(line.split("  ")) for line in sums.read_text().splitlines())
    assert "config.json" in lines
    for name, digest in lines.items():
        assert hashlib.sha256((finished.run / "export" / name).read_bytes()).hexdigest() == digest
