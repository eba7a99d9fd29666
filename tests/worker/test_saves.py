"""Checkpoints of whole runs in their own processes: written while training goes on, killed meanwhile, without room."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from miles_spmd.controller.checkpoint_folders import unfinished
from miles_spmd.ledger.chain import verify
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import complete_checkpoints
from tests import forked
from tests.worker.launched import REPOSITORY, START_SECONDS, Launched
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

SETTINGS = {
    "run": {"num_rollout": 6},
    "rollout": {"engine": REFERENCE_ENGINE},
    "reward": {"rm_type": "tests.worker.rewards:by_length"},
    "checkpoint": {"save_interval": 2, "export_final": False},
    "determinism": {"deterministic": True, "parity": "off"},
    "megatron": {"lr": 1e-2, "use_distributed_optimizer": True},
}


class LaunchedWithAHeldSave(Launched):
    """A run of two ranks under held_save.py."""

    def __init__(self, folder: Path, config: Path, held: str, rank: int) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / "tiny"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, str(Path(__file__).with_name("held_save.py")), held, str(rank), "train", str(config)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.launcher = forked.start(command, folder, environment, folder / "stdout", folder / "stderr")


def test_a_rank_is_killed_while_it_writes(tmp_path: Path) -> None:
    """Training goes on while a checkpoint is written; nothing that was complete is lost; and the run that resumes comes
    to the same steps, bitwise."""
    config = write_config(tmp_path, write_checkpoint(tmp_path / "model"), **SETTINGS)
    run = LaunchedWithAHeldSave(tmp_path, config, "step_000004.incomplete", rank=1)
    try:
        pid = run.wait_until_held()
        run.wait_for_steps(5)  # the fifth step is reported, and the checkpoint before it is not complete
        assert list(complete_checkpoints(run.run_dir)) == [2]
        assert [path.name for path in unfinished(run.run_dir)] == ["step_000004.incomplete"]
        os.kill(pid, signal.SIGKILL)
        assert run.finish().startswith("rank 1 (")
    finally:
        run.clean_up()
    killed = verify(Path(shutil.copytree(run.run_dir / "ledger", tmp_path / "killed" / "ledger")).parent)
    assert {0, 1, 2, 3, 4} <= killed.steps.keys()
    command = ["-m", "miles_spmd", "train", config, "checkpoint.resume=true", "keep_last=1", "--nproc-per-node=2"]
    done = forked.run(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    left = run.run_dir / "checkpoints" / "step_000004.incomplete"
    assert f"warning: {left} was not finished when its run ended; continuing from" in done.stderr
    resumed = verify(run.run_dir)
    assert list(resumed.steps) == [0, 1, 2, 3, 4, 5]
    assert {step: resumed.steps[step] for step in killed.steps} == killed.steps
    assert resumed.saved.items() >= killed.saved.items()
    assert sorted(path.name for path in left.parent.iterdir()) == ["latest", "step_000006"]
    metrics = read_metrics(run.run_dir / "metrics.jsonl")
    assert metrics[4]["perf/save_time"] >= 0
    written = [metrics[step] for step in metrics if "perf/save_write_time" in metrics[step]]
    assert written
    assert all(step["checkpoint/bytes"] > 0 for step in written)


def test_checkpoints_without_room(tmp_path: Path) -> None:
    """The first one that fails is a warning that names the file, and the run goes on; the second one ends it."""
    config = write_config(tmp_path, write_checkpoint(tmp_path / "model"), **SETTINGS)
    run = Launched(tmp_path, config, ranks=1, file_kib=200)
    try:
        assert run.launcher.wait(START_SECONDS) != 0, run.report()
    finally:
        run.clean_up()
    warned, ended = [line for line in run.stderr().splitlines() if line.startswith("miles-spmd: ")]
    folder = run.run_dir / "checkpoints"
    assert warned.startswith("miles-spmd: warning: the checkpoint of step 2 could not be written: [Errno 27] File too")
    file = folder / "step_000002.incomplete" / "actor" / "rank_00000.bin"
    assert f"'{file}'; no other one exists; the run goes on" in warned
    assert "SaveError: the checkpoint of step 4 could not be written: [Errno 27] File too large" in ended
    assert ended.split(" (traceback in ")[0].endswith("raise the limit, and continue with checkpoint.resume=true")
    assert list(folder.iterdir()) == []
    assert max(read_metrics(run.run_dir / "metrics.jsonl")) >= 4
