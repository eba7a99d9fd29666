"""What a run says that hangs in a collective: whole runs of two ranks, whose loss is at fault."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

from tests import forked
from tests.worker.tiny_run import REFERENCE_ENGINE, write_config

HOST = socket.gethostname()


def hang(folder: Path, checkpoint: Path, loss: str) -> tuple[list[str], Path]:
    """Return the lines of the message that ends a run with that loss, and its logs."""
    config = write_config(
        folder,
        checkpoint,
        rollout={"engine": REFERENCE_ENGINE},
        algorithm={"loss_type": f"tests.worker.losses:{loss}"},
        deadlines={"train_timeout": 4.0},
    )
    done = forked.run("-m", "miles_spmd", "train", config, "--nproc-per-node=2", folder=folder)
    assert done.returncode == 1, done.stderr
    first = "train, step 0: rank 0, 1 did not reply within 4 s"
    assert f"miles-spmd: {first}\n" in done.stderr, done.stderr
    message = done.stderr[done.stderr.index(first) :].splitlines()
    print("\n".join(message))
    return message, folder / "runs" / "tiny" / "logs" / "latest"


def test_a_rank_that_does_not_come_to_a_collective_is_named_with_its_stack(tmp_path: Path, checkpoint: Path) -> None:
    message, logs = hang(tmp_path, checkpoint, "hangs_on_rank_1")
    waits = (
        r"  rank 0 in all_reduce \(Float \[\d+\]\) for (\d\.\d) s or more, number \d+ of .+ \(ranks 0, 1\); "
        "not entered by rank 1"
    )
    found = re.fullmatch(waits, message[1])
    assert found, message
    assert 0 < float(found[1]) < 10
    assert message[2].startswith("  rank 1 in hangs_on_rank_1 (losses.py:"), message
    assert " < _loss (trainer.py:" in message[2]
    assert message[3].startswith("  rank 0 in ")
    assert " < start_grad_sync (" in message[3]
    record = json.loads((logs / "rank-0.collectives.json").read_text())
    assert record["entries"][-1]["profiling_name"] == "gloo:all_reduce"


def test_ranks_that_call_different_collectives_are_told_apart(tmp_path: Path, checkpoint: Path) -> None:
    message, _ = hang(tmp_path, checkpoint, "broadcasts_on_rank_1")
    calls = r"  ranks call different collectives as number \d+ of .+ \(ranks 0, 1\): (.*)"
    found = re.fullmatch(calls, message[1])
    assert found, message
    assert found[1] == "rank 0 all_reduce (Float [3]); rank 1 broadcast (Float [3])"
