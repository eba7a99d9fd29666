"""Names of files in a run's folder that more than one room reads, and which checkpoints are complete."""

from __future__ import annotations

import contextlib
from pathlib import Path

ENGINES_ALONE = ("generate", "serve")  # tasks for which no rank trains
NO_ROWS = "none:none"  # data.prompt_data of "serve", which reads none
METRICS_FILE = "metrics.jsonl"
API_KEY_FILE, BASE_URL_FILE = "api_key", "base_url"  # of a server, while it serves
CONFIG_FILE = "config.toml"
NEXT_CONFIG = ".config.toml.next"  # of an attempt that continues a run, until its checkpoint is loaded
CHECKPOINTS = "checkpoints"
TURNS = "turns"  # finished responses of steps that no checkpoint has yet
CHECKPOINT_MARK = "controller.json"  # in a checkpoint's folder: the last file, without which it is not complete


def newest_config(run_dir: Path) -> Path:
    """Return the file with the settings of the newest attempt."""
    following = run_dir / NEXT_CONFIG
    return following if following.exists() else run_dir / CONFIG_FILE


def adopt_config(run_dir: Path) -> None:
    """Let the settings of the newest attempt be those of the run. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        (run_dir / NEXT_CONFIG).replace(run_dir / CONFIG_FILE)


def complete_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return the folders of the complete checkpoints of a run by step, in order."""
    return complete_in(run_dir / CHECKPOINTS)


def complete_in(folder: Path) -> dict[int, Path]:
    """Return the complete ones of the checkpoints in ``folder`` by step, in order."""
    return {step: path for step, path in by_step(folder).items() if (path / CHECKPOINT_MARK).exists()}


def by_step(folder: Path) -> dict[int, Path]:
    """Return the folders ``step_000020`` in ``folder``, complete or not, by step, in order."""
    numbered = {path.name.removeprefix("step_"): path for path in folder.glob("step_*")}
    return dict(sorted((int(number), path) for number, path in numbered.items() if number.isdecimal()))
