"""What people read of a sample: a conversation of several turns is shown in order, its last message as the response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from miles_spmd.config import Config
from miles_spmd.telemetry.transcripts import TRANSCRIPTS_FILE, write_transcripts
from miles_spmd.types.sample import Prompt
from tests.samples import sample_of


def test_a_conversation_is_shown_in_order(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [{"role": "user", "content": "2 + 2?"}]
    one = sample_of(Prompt("sums:0", "2 + 2?", [5], metadata={"messages": asked}), 0, [7], text="four", reward=1.0)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    result = {"role": "tool", "content": "4"}
    one.trajectory.messages = [*asked, call, result, {"role": "assistant", "content": "four"}]
    one.trajectory.reward_turn(0.5)
    config = Config(
        model={"hf_checkpoint": "none"}, data={"prompt_data": "none"}, run={"output_dir": str(tmp_path), "name": "run"}
    )
    config.run_dir.mkdir()
    write_transcripts(config, 0, {"sums": [[one]]})
    (line,) = (config.run_dir / TRANSCRIPTS_FILE).read_text().splitlines()
    shown = json.loads(line)
    assert [message["role"] for message in shown["messages"]] == ["user", "assistant", "tool"]
    assert '"name":"add"' in shown["messages"][1]["content"]
    assert shown["response"] == "four"
    assert (shown["reward"], shown["turn_rewards"]) == (1.0, [0.5])
