"""`[data]`: prompts, responses and preferences to train on."""

from __future__ import annotations

import re
from pathlib import Path

from miles_spmd.config.rules import FILES, Messages, Settings, rule
from miles_spmd.config.table import PositiveInt, Table


class DataConfig(Table):
    prompt_data: str
    """JSONL or parquet file to train on; `path@[0:1000]` takes a slice of its rows."""
    input_key: str = "prompt"
    """Column of the prompt: a string or a list of chat messages."""
    label_key: str | None = "label"
    """Column of what a reward function compares a response with, and of the response in `sft`; `none`: no column."""
    chosen_key: str = "chosen"
    """Column of the preferred response (`dpo`, `rm`): a string, or the messages that continue the input's."""
    rejected_key: str = "rejected"
    """Column of the rejected response (`dpo`, `rm`), in the form of the preferred one."""
    metadata_key: str | None = "metadata"
    """Column of a mapping that is handed to custom reward functions; rows may leave it out, `none`: no column."""
    apply_chat_template: bool = False
    """Wrap a plain string as one user message. Message lists always go through the template."""
    rollout_shuffle: bool = True
    """Shuffle the rows anew in every epoch, as a function of `run.seed`; else they come in the file's order."""
    rollout_max_prompt_len: PositiveInt | None = None
    """Longest prompt in tokens. A longer one is an error naming its line, unless `drop_long_prompts`; `none`: any."""
    drop_long_prompts: bool = False
    """Leave out the rows whose prompt is longer than `rollout_max_prompt_len`."""


@rule(FILES)
def _data_files(s: Settings) -> Messages:
    evaluation = {f"eval.eval_prompt_data.{name}": path for name, path in s.eval_prompt_data.items()}
    for name, path in ({"data.prompt_data": s.prompt_data} | evaluation).items():
        file = re.sub(r"@\[[^\]]*\]$", "", path)
        if not Path(file).is_file():
            yield f"{name}: no file {file}"
