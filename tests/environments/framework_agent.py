"""An agent of a framework from the package index, in an interpreter of its own: reads a line of JSON for each episode,
with address, key and prompt, and writes one with what the agent said in the end.

    python framework_agent.py openai-agents
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any


def calculator(expression: str) -> str:
    """Calculate the sum, the difference or the product of two integers.

    Args:
        expression: Such as 12+3, 12-3 or 12*3.
    """
    match = re.fullmatch(r"(\d{1,9})([-+*])(\d{1,9})", expression)
    if match is None:
        return "Error: not two integers with +, - or * between them"
    left, right = int(match[1]), int(match[3])
    return str({"+": left + right, "-": left - right, "*": left * right}[match[2]])


async def openai_agents(base_url: str, api_key: str, prompt: str) -> str:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        model = OpenAIChatCompletionsModel("policy", client)
        agent = Agent(name="calculator", tools=[function_tool(calculator)], model=model)
        return str((await Runner.run(agent, prompt, max_turns=3)).final_output)


async def openai_agents_responses(base_url: str, api_key: str, prompt: str) -> str:
    from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        model = OpenAIResponsesModel("policy", client)
        agent = Agent(name="calculator", tools=[function_tool(calculator)], model=model)
        return str((await Runner.run(agent, prompt, max_turns=3)).final_output)


async def pydantic_ai(base_url: str, api_key: str, prompt: str) -> str:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("policy", provider=OpenAIProvider(base_url=base_url, api_key=api_key))
    return str((await Agent(model, tools=[calculator]).run(prompt)).output)


async def smolagents(base_url: str, api_key: str, prompt: str) -> str:
    from smolagents import OpenAIModel, ToolCallingAgent, tool

    model = OpenAIModel("policy", api_base=base_url, api_key=api_key)
    agent = ToolCallingAgent(tools=[tool(calculator)], model=model, max_steps=3, verbosity_level=0)
    return str(await asyncio.to_thread(agent.run, prompt))


FRAMEWORKS = {
    "openai-agents": openai_agents,
    "openai-agents-responses": openai_agents_responses,
    "pydantic-ai": pydantic_ai,
    "smolagents": smolagents,
}


async def main(framework: str) -> None:
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def episode(order: dict[str, Any]) -> None:
        try:
            said = await FRAMEWORKS[framework](order["base_url"], order["api_key"], order["prompt"])
            problem = ""
        except Exception as error:  # such as a tool that does not exist, or too many turns
            said, problem = "", f"{type(error).__name__}: {error}"
        print(json.dumps({"id": order["id"], "said": said, "problem": problem}), flush=True)

    while line := await loop.run_in_executor(None, sys.stdin.readline):
        task = asyncio.ensure_future(episode(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
