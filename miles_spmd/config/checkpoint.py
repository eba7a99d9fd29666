"""`[checkpoint]`: what a run saves, exports and resumes from."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.config.rules import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeInt, Table


class CheckpointConfig(Table):
    save_interval: NonNegativeInt = 0
    """Write a resumable checkpoint every n rollouts; 0: only where `save_final` asks for one."""
    save_final: bool = False
    """Write a resumable checkpoint at the end of the run."""
    export_final: bool = True
    """Write a Hugging Face checkpoint at the end of the run."""
    export_dir: Path | None = None
    """Folder of the Hugging Face checkpoint; the default is `export/` in the run folder."""
    load: Path | None = None
    """A checkpoint folder of this project to resume from; `latest` inside the run folder when the run is restarted."""
    resume: bool = False
    """Continue from the run folder's newest checkpoint if there is one. `miles-spmd eval` scores that checkpoint."""


@rule(ERRORS)
def _continue_or_delete(s: Settings) -> Messages:
    if s.resume and s.overwrite:
        yield "checkpoint.resume continues what run.overwrite would delete: set one of them"


@rule(FILES)
def _resumable(s: Settings) -> Messages:
    if s.load is not None and not s.load.is_dir():
        yield f"checkpoint.load: no folder {s.load}"
