"""The environment ``tools`` where it runs: in an environment process, with tools in processes of their own."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from miles_spmd.config import EnvironmentConfig
from miles_spmd.environments.context import ModelSource
from miles_spmd.environments.messages import Ask, Begin, Completed, Finished
from miles_spmd.environments.pool import EnvironmentPool
from miles_spmd.types.trajectory import FinishReason
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import to_prompt

HERE = "tests.environments.user_tools:"


def test_a_conversation_in_an_environment_process(tmp_path: Path) -> None:
    tokenizer = write_family(tmp_path, FAMILIES["qwen"])
    functions = [HERE + "misbehave", HERE + "lookup"]
    config = EnvironmentConfig(
        environment="miles_spmd.environments.tools:tools",
        environment_kwargs={"functions": functions, "tool_timeout": 1.0, "tool_memory_gib": 1.0},
        environment_workers=1,
    )
    said = [
        '<tool_call>\n{"name": "misbehave", "arguments": {"how": "hang"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "lookup", "arguments": {"key": "\\ud83d 123456789012345678901234567890"}}\n</tool_call>'
        '<tool_call>\n{"name": "misbehave", "arguments": {"how": 123456789012345678901234567890}}\n</tool_call>',
        "Nothing.",
    ]
    prompt = to_prompt(tokenizer, [{"role": "user", "content": "What now?"}])
    before = set(psutil.Process().children(recursive=True))
    pool = EnvironmentPool(config, ModelSource(tmp_path, 10**6, 4096, "2026-01-01"), tmp_path / "environments.log")
    pool.send(Begin(7, prompt, 0, 10_000))
    deadline, finished = time.monotonic() + 60, None
    while finished is None:
        assert time.monotonic() < deadline, (tmp_path / "environments.log").read_text()
        time.sleep(0.02)
        while pool.events:
            event = pool.events.popleft()
            if isinstance(event, Ask):
                tokens = tokenizer.encode(said.pop(0) + "<|im_end|>")
                pool.send(Completed(event.episode, event.segment, tokens, FinishReason.STOP))
            else:
                finished = event
    pool.close()
    assert isinstance(finished, Finished), finished
    (end,) = finished.ends
    assert end.text == "Nothing."
    results = [message["content"] for message in end.messages if message["role"] == "tool"]
    assert results[0] == "Error: misbehave took longer than 1 s and was stopped."
    assert results[1].startswith('{"key": "? 1234')
    assert "the argument 'how' is wrong" in results[2]
    assert finished.metrics["tool_errors/timeout"] == 1
    left = set(psutil.Process().children(recursive=True)) - before
    assert not psutil.wait_procs(left, timeout=5)[1]
