"""A run that cannot write: one line names the file, and what can be saved is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.launched import START_SECONDS, Launch


@pytest.mark.parametrize("file_kib", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_message(launch: Launch, file_kib: int) -> None:
    """Here a limit of every file's size. A message names the file, what is written is whole, nothing is a traceback."""
    many = {"num_rollout": 1000}
    run = launch(ranks=1, file_kib=file_kib, run=many, telemetry={"use_tensorboard": True})
    message = run.finish(START_SECONDS)
    assert "OSError: [Errno 27] File too large: " in message
    assert message.split(" (traceback in ")[0].endswith("raise the limit, and continue with checkpoint.resume=true")
    assert "Traceback" not in run.stderr()
    settings = (run.run_dir / "config.toml").read_text()  # what the backends ran with is added to it, or is not
    assert settings.endswith("\n")
    ledger = run.run_dir / "ledger" / "chain.jsonl"
    chain = ledger.read_bytes() if ledger.exists() else b""
    assert chain.endswith(b"}\n") or not chain


def test_an_export_that_fails_leaves_a_checkpoint(launch: Launch, tmp_path: Path) -> None:
    """Something stands in its way that was not there at the start."""
    export = tmp_path / "export"
    run = launch(run={"num_rollout": 30}, checkpoint={"export_final": True, "export_dir": str(export)})
    run.wait_for_steps(1)
    (tmp_path / ".export.partial").write_text("a file in the place of a folder")
    message = run.finish()
    assert message.startswith(f"checkpoint, step 30: ExportError: {export}: export failed: ")
    saved = run.run_dir / "checkpoints" / "step_000030"
    assert f"`miles-spmd export {saved} OUT`" in message
    assert (saved / "controller.json").is_file()
