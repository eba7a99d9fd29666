"""Checkpoints on GPUs: from pinned memory, or from where an offloaded trainer's state is already."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.training.cases import ZERO, config
from tests.training.test_checkpoint import ADAM, RUN, history, saved_beside_training


@pytest.mark.parametrize("offloads", [False, True])
def test_what_is_written_beside_training_is_what_was_there(ranks: Ranks, tmp_path: Path, offloads: bool) -> None:
    run = config("qwen3", ZERO | ADAM, model={"dtype": "bfloat16"}, **RUN)
    assert ranks.run(1, saved_beside_training, run, tmp_path, offloads) == [True]


def test_resume(ranks: Ranks, tmp_path: Path) -> None:
    run = config("qwen3", ZERO | ADAM, model={"dtype": "bfloat16"}, **RUN)
    whole = ranks.run(1, history, run, str(tmp_path / "checkpoint"), 6, False, 3)[0]
    assert ranks.run(1, history, run, str(tmp_path / "checkpoint"), 3, True)[0] == whole[3:]
