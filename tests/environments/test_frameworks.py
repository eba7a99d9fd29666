"""Agent frameworks from the package index, unchanged but for their base_url. They require another version of OpenAI's
client than SGLang, hence an interpreter of their own:

    python -m venv FOLDER
    FOLDER/bin/pip install openai-agents==0.24.0 smolagents==1.26.0 'pydantic-ai-slim[openai]==2.68.0'
    AGENTS_PYTHON=FOLDER/bin/python launch/test.sh -m slow tests/environments/test_frameworks.py
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.sessions.endpoint import Endpoint
from miles_spmd.environments.sessions.session import Session
from miles_spmd.quickstart.__main__ import recipes
from miles_spmd.quickstart.assets import build_assets
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import METRICS_FILE
from tests import forked
from tests.environments.agent_samples import Framework
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext, Turn

PYTHON = os.environ.get("AGENTS_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="AGENTS_PYTHON names no interpreter with agent frameworks"),
]


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


SCRIPTS = {
    "openai-agents": ["It is 4."],
    "openai-agents-responses": ["It is 4."],
    "pydantic-ai": ["It is 4."],
    "smolagents": [f"So. {call('final_answer', answer='It is 4.')}"],
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_family(tmp_path_factory.mktemp("qwen"), FAMILIES["qwen"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_history_is_recognised(qwen: Tokenizer, name: str) -> None:
    """Whatever a framework does to messages, the conversation stays one trajectory, of what was sampled."""

    async def play() -> None:
        said = [f"<think>\nHm.\n</think>\n\n Let me see. \n{call('calculator', expression='2+2')}", *SCRIPTS[name]]
        said.insert(1, f"{call('calculator', expression='(2+2)')}\n{call('calculator', expression='2*2')}")
        tokens = [qwen.encode(f"{text}<|im_end|>") for text in said]
        context = ScriptedContext(qwen, list(map(Turn, tokens)))
        async with Endpoint().open(Session(context)) as session:
            done = await Framework().run(PYTHON, name, session, "2 plus 2 <|im_end|>")
        assert (done["said"], done["problem"]) == ("It is 4.", "")
        (trajectory,) = session.trajectories
        assert [one.tokens for one in trajectory.segments if one.sampled] == tokens
        assert not any(metric.startswith("session_branches") for metric in context.metrics), context.metrics
        (end,) = qwen.encode("<|im_end|>")
        given = [one.tokens for one in trajectory.segments if not one.sampled]
        assert [one.count(end) for one in given] == [1, 1]
        assert "4" in context.decode(given[0])

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.timeout(1800)
def test_it_learns_to_call_a_tool(tmp_path: Path) -> None:
    """The calculator's task, with OpenAI's agents in place of the environment ``tools``."""
    build_assets(tmp_path / "runs" / "calculator" / "assets", name="calculator")
    agent = f"environment.environment_kwargs={{python = '{PYTHON}', name = 'openai-agents'}}"
    ours = ["environment.environment=tests.environments.agent_samples:framework", agent, "run.num_rollout=10"]
    sft, grpo = recipes("calculator")
    for recipe, settings in ((sft, []), (grpo, ours)):
        command = ["-m", "miles_spmd", "train", recipe, "--nproc-per-node=1", *settings]
        done = forked.run(*command, folder=tmp_path, timeout=900)
        assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "runs" / "calculator" / "grpo" / METRICS_FILE)
    assert metrics[0]["eval/heldout"] < 0.5
    assert metrics[10]["eval/heldout"] >= 0.85
    assert all(metrics[step]["parity/mismatches"] == 0 for step in range(1, 11))
    assert all(metrics[step]["rollout/env/agent_trajectories"] == 1 for step in range(1, 11))
