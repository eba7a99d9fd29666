"""The environment ``tools`` where it runs: in an environment process, with tools in processes of their own."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from miles_spmd.config import EnvironmentConfig
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.context import ModelSource
from miles_spmd.environments.messages import Ask, Begin, Completed, Event, Finished
from miles_spmd.environments.pool import EnvironmentPool
from miles_spmd.sandbox.sandbox import problem
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import to_prompt
from tests.services.server import serving

HERE = "tests.environments.user_tools:"


def converse(config: EnvironmentConfig, tokenizer: Tokenizer, folder: Path, prompt: Prompt, said: list[str]) -> Event:
    """Run one episode in which the policy responds with ``said``."""
    pool = EnvironmentPool(config, ModelSource(folder, 10**6, 4096, "2026-01-01"), folder / "environments.log")
    pool.send(Begin(7, prompt, 0, 10_000))
    deadline, finished = time.monotonic() + 60, None
    while finished is None:
        assert time.monotonic() < deadline, (folder / "environments.log").read_text()
        time.sleep(0.02)
        while pool.events:
            event = pool.events.popleft()
            if isinstance(event, Ask):
                tokens = tokenizer.encode(said.pop(0) + "<|im_end|>")
                pool.send(Completed(event.episode, event.segment, tokens, FinishReason.STOP))
            else:
                finished = event
    pool.close()
    return finished


def test_a_conversation_in_an_environment_process(tmp_path: Path) -> None:
    tokenizer = write_family(tmp_path, FAMILIES["qwen"])
    functions = [HERE + name for name in ("misbehave", "lookup", "stubborn")]
    config = EnvironmentConfig(
        environment="miles_spmd.environments.tools:tools",
        environment_kwargs={"functions": functions, "tool_timeout": 1.0, "tool_memory_gib": 1.0},
        environment_workers=1,
    )
    said = [
        '<tool_call>\n{"name": "misbehave", "arguments": {"how": "hang"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "lookup", "arguments": {"key": "\\ud83d 123456789012345678901234567890"}}\n</tool_call>'
        '<tool_call>\n{"name": "misbehave", "arguments": {"how": 123456789012345678901234567890}}\n</tool_call>'
        '<tool_call>\n{"name": "stubborn", "arguments": {"how": "always"}}\n</tool_call>',
        "Nothing.",
    ]
    prompt = to_prompt(tokenizer, [{"role": "user", "content": "What now?"}])
    before = set(psutil.Process().children(recursive=True))
    finished = converse(config, tokenizer, tmp_path, prompt, said)
    assert isinstance(finished, Finished), finished
    (end,) = finished.ends
    assert end.text == "Nothing."
    results = [message["content"] for message in end.messages if message["role"] == "tool"]
    assert results[0] == "Error: misbehave took longer than 1 s and was stopped."
    assert results[1].startswith('{"key": "? 1234')
    assert "the argument 'how' is wrong" in results[2]
    assert results[3] == "Error: stubborn took longer than 1 s and was stopped."
    assert finished.metrics["tool_errors/timeout"] == 2
    left = set(psutil.Process().children(recursive=True)) - before
    assert not psutil.wait_procs(left, timeout=5)[1]


@pytest.mark.skipif(problem() is not None, reason=f"no sandbox: {problem()}")
def test_the_built_in_tools_in_an_environment_process(tmp_path: Path) -> None:
    tokenizer = write_family(tmp_path, FAMILIES["qwen"])
    with serving(lambda body, _: {"result": [[{"contents": body["queries"][0].upper()}]]}) as server:
        options = {"search": {"url": server.url}, "python": {"seconds": 5}}
        config = EnvironmentConfig(
            environment="tools",
            environment_kwargs={"functions": ["python", "search"], **options},
            environment_workers=1,
        )
        said = [
            '<tool_call>\n{"name": "python", "arguments": {"code": "print(2**10)"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "search", "arguments": {"query": "oslo"}}\n</tool_call>',
            "Done.",
        ]
        prompt = to_prompt(tokenizer, [{"role": "user", "content": "What now?"}])
        finished = converse(config, tokenizer, tmp_path, prompt, said)
    assert isinstance(finished, Finished), finished
    assert [m["content"] for m in finished.ends[0].messages if m["role"] == "tool"] == ["1024\n", "[1] OSLO"]
