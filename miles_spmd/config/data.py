"""`[data]`: prompts, responses and preferences to train on."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from miles_spmd.config.rules import FILES, Messages, Settings, rule
from miles_spmd.config.table import PositiveInt, Table, must_be

# What a chat template is given by other ways than `chat_template_kwargs`.
TEMPLATE_VARIABLES = frozenset(
    {
        "messages",
        "conversations",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "return_assistant_tokens_mask",
        "strftime_now",
    }
)


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


class DataConfig(Table):
    prompt_data: str
    """JSONL, JSON or parquet file to train on; `path@[0:1000]` takes a slice of its rows."""
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
    """Wrap a plain string as one user message. Message lists always go through the chat template."""
    system_prompt: str | None = None
    """System message put before every conversation that does not begin with one; `none`: no message."""
    tool_key: str | None = "tools"
    """Column of the tools that the chat template is given: a list of JSON schemas, also as JSON text; rows may leave it
    out, `none`: no column."""
    chat_template_kwargs: Annotated[
        dict[str, Any],
        must_be(
            f"without {', '.join(sorted(TEMPLATE_VARIABLES))}", lambda given: not TEMPLATE_VARIABLES.intersection(given)
        ),
    ] = {}
    """Further variables of the chat template, such as `{ enable_thinking = false }`. A row's own, in a column
    `chat_template_kwargs`, come before these."""
    chat_template_date: Annotated[str, must_be("a date such as 2026-01-31", _is_date)] = "2026-01-01"
    """What a chat template reads as today, so that prompts do not depend on when a run is started or resumed."""
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
        if not Path(file).expanduser().is_file():
            yield f"{name}: no file {file}"
