"""The endpoint of sessions on the loopback interface, and real clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from miles_spmd.types.trajectory import FinishReason
from tests.environments.endpoint_bench import USER, Bench, Play, player
from tests.environments.scripted import Turn
from tests.environments.test_exactness import TOOLS

CALL = '<tool_call>\n{"name": "look", "arguments": {"value": "so"}}\n</tool_call>'


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    return player(tmp_path_factory.mktemp("qwen"))


def test_a_conversation_with_tools(play: Play) -> None:
    """The client appends messages as they are; the trajectory is one, with the tokens that were sampled."""

    async def test(bench: Bench) -> None:
        said = [f"<think>\nHm.\n</think>\n\nSo:{CALL}<|im_end|>", "It is 4.<|im_end|>"]
        async with bench.open(*said) as client:
            messages: list[Any] = [USER]
            first = await client.chat.completions.create(
                model="any", messages=messages, tools=TOOLS, extra_body={"return_token_ids": True}
            )
            (choice,) = first.choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So:")
            assert choice.message.model_extra["reasoning_content"] == "Hm."
            (call,) = choice.message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"value": "so"})
            assert choice.model_extra["token_ids"] == bench.tokenizer.encode(said[0])
            messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "4<|im_end|>"}]
            second = await client.chat.completions.create(model="any", messages=messages, tools=TOOLS)
            assert (second.choices[0].finish_reason, second.choices[0].message.content) == ("stop", "It is 4.")
        (trajectory,) = bench.session.trajectories
        sampled = [bench.context.decode(one.tokens) for one in trajectory.segments if one.sampled]
        assert sampled == said
        usage, all_tokens = second.usage, trajectory.tokens
        assert (usage.total_tokens, usage.completion_tokens) == (len(all_tokens), len(bench.tokenizer.encode(said[1])))
        assert first.model_extra["prompt_token_ids"] == trajectory.start
        (end,) = bench.tokenizer.encode("<|im_end|>")
        assert all_tokens.count(end) == 5  # the tools, the user, both of the policy, the result: but not what it spells
        assert [one["role"] for one in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
        assert (trajectory.text, bench.context.metrics) == ("It is 4.", {})

    play(test)


def test_a_stream_is_the_response(play: Play) -> None:
    async def test(bench: Bench) -> None:
        said = f"<think>\nHm.\n</think>\n\nSo:{CALL}<|im_end|>"
        async with bench.open(said, said) as client:
            tools: Any = [{**tool, "function": tool["function"] | {"strict": True}} for tool in TOOLS]
            whole = await client.chat.completions.create(model="a", messages=[USER], tools=tools, n=2)
            stream = client.chat.completions.stream(
                model="a", messages=[USER], tools=tools, n=2, stream_options={"include_usage": True}
            )
            async with stream as events:
                streamed = await events.get_final_completion()
        for one, other in zip(whole.choices, streamed.choices, strict=True):
            assert (one.finish_reason, one.message.content) == (other.finish_reason, other.message.content)
            calls = [
                [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
                for choice in (one, other)
            ]
            assert calls[0] == calls[1]
        assert (streamed.usage, streamed.id) == (whole.usage, whole.id)  # the same request, which is not sampled again
        assert bench.context.metrics == {"session_repeats": 1.0, "session_branches/choices": 1.0}
        assert len(set(bench.context.paths)) == len(bench.session.trajectories) == 2

    play(test)


def test_the_responses_api_is_the_same_conversation(play: Play) -> None:
    async def test(bench: Bench) -> None:
        said = [f"<think>\nHm.\n</think>\n\nSo:{CALL}<|im_end|>", "It is 4.<|im_end|>"]
        tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
        async with bench.open(*said) as client:
            given: list[Any] = [{"role": "user", "content": "What now?"}]
            first = await client.responses.create(model="a", input=given, tools=tools, instructions="Be brief.")
            assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
            assert first.output_text == "So:"
            call = first.output[2]
            assert (call.name, json.loads(call.arguments)) == ("look", {"value": "so"})
            given += [item for item in first.output if item.type != "reasoning"]
            given.append({"type": "function_call_output", "call_id": call.call_id, "output": "4"})
            stream = await client.responses.create(
                model="a", input=given, tools=tools, instructions="Be brief.", stream=True
            )
            events = [event async for event in stream]
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "It is 4."
            assert events[-1].type == "response.completed"
            assert events[-1].response.output_text == "It is 4."
        (trajectory,) = bench.session.trajectories
        assert [bench.context.decode(one.tokens) for one in trajectory.segments if one.sampled] == said
        assert [one["role"] for one in trajectory.messages] == ["system", "user", "assistant", "tool", "assistant"]
        assert not bench.context.metrics

    play(test)


def test_a_response_continues_the_previous_one(play: Play) -> None:
    """By its id: the conversation keeps the tokens, through calls and reasoning, and from one response in two ways."""

    async def test(bench: Bench) -> None:
        said = [f"<think>\nHm.\n</think>\n\nSo:{CALL}<|im_end|>", "It is 4.<|im_end|>", "5<|im_end|>", "6<|im_end|>"]
        settings: Any = {
            "model": "a",
            "tools": [{"type": "function", **tool["function"]} for tool in TOOLS],
            "instructions": "Be brief.",
        }
        async with bench.open(*said, "New.<|im_end|>") as client:
            first = await client.responses.create(input="What now?", **settings)
            given: list[Any] = [{"type": "function_call_output", "call_id": first.output[2].call_id, "output": "4"}]
            second = await client.responses.create(input=given, previous_response_id=first.id, **settings)
            assert (second.output_text, second.previous_response_id) == ("It is 4.", first.id)
            third = await client.responses.create(input="And?", previous_response_id=second.id, **settings)
            again = await client.responses.create(input="And?", previous_response_id=second.id, **settings)
            other = await client.responses.create(input="Or?", previous_response_id=second.id, **settings)
            assert [one.output_text for one in (third, again, other)] == ["5", "5", "6"]
            for wrong in ("resp-0", first.id.removeprefix("resp-"), "x" * 1000):
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.responses.create(input="And?", previous_response_id=wrong, **settings)
                assert caught.value.code == "previous_response_not_found"
            del settings["instructions"]  # they are not carried over: this is another conversation
            last = await client.responses.create(input="And?", previous_response_id=third.id, **settings)
            assert last.output_text == "New."
        line, branch, new = bench.session.trajectories
        texts = [[bench.context.decode(s.tokens) for s in one.segments if s.sampled] for one in (line, branch)]
        assert sorted(texts) == [[*said[:2], said[2]], [*said[:2], said[3]]]
        assert (line.start, line.segments[:3]) == (branch.start, branch.segments[:3])
        assert [one["role"] for one in line.messages] == [
            *("system", "user", "assistant", "tool", "assistant", "user", "assistant")
        ]
        assert [one["role"] for one in new.messages] == [one["role"] for one in line.messages[1:]] + [
            "user",
            "assistant",
        ]
        assert bench.context.metrics == {
            "session_repeats": 1.0,
            "session_branches/fork": 1.0,
            "session_branches/history": 1.0,
        }

    play(test)


def test_a_text_is_continued(play: Play) -> None:
    """A prompt that begins with an earlier one and its response keeps the tokens; another one is a branch."""

    async def test(bench: Bench) -> None:
        said = ["O", "A.</x>", "so<|im_end|>", "Hello.", "Hi."]
        async with bench.open(*said) as client:
            prompt = "<|im_start|>system\nList:"
            first = await client.completions.create(
                model="a", prompt=prompt, logprobs=1, extra_body={"return_token_ids": True}
            )
            (choice,) = first.choices
            assert (choice.text, choice.finish_reason, choice.logprobs.text_offset) == ("O", "stop", [0])
            assert (choice.logprobs.tokens, choice.logprobs.token_logprobs) == (["O"], [-0.5])
            assert first.model_extra["prompt_token_ids"] == bench.tokenizer.encode(prompt)
            second = await client.completions.create(model="a", prompt=[f"{prompt}O"], stop="</x>", max_tokens=9)
            assert second.choices[0].text == "A."
            stream = await client.completions.create(
                model="a", prompt=f"{prompt}OA.</x> And:", stream=True, stream_options={"include_usage": True}
            )
            parts = [part async for part in stream]
            assert "".join(choice.text for part in parts for choice in part.choices) == "so"
            assert parts[-1].usage.completion_tokens == 3
            other = await client.completions.create(model="a", prompt="<|im_start|>user", n=2)
            assert [one.text for one in other.choices] == ["Hello.", "Hi."]
            for wrong in ({"prompt": ["a", "b"]}, {"prompt": ""}, {"prompt": "a", "echo": True}, {"prompt": [1, "a"]}):
                with pytest.raises(openai.BadRequestError):
                    await client.completions.create(model="a", **wrong)
        first_line, *others = bench.session.trajectories
        ((o,), (a,)), tokens = map(bench.tokenizer.encode, "OA"), first_line.response
        assert tokens[:2] == [o, a]
        assert bench.context.decode(first_line.tokens) == f"{prompt}OA.</x> And:so<|im_end|>"
        assert [one.turns for one in (first_line, *others)] == [3, 1, 1]
        assert bench.context.metrics == {"session_branches/conversation": 1.0, "session_branches/choices": 1.0}

    play(test)


def test_log_probs_and_limits(play: Play) -> None:
    async def test(bench: Bench) -> None:
        cut = Turn(bench.tokenizer.encode("Oslo"), FinishReason.LENGTH)
        async with bench.open(cut) as client:
            response = await client.chat.completions.create(
                model="a", messages=[USER], logprobs=True, max_completion_tokens=3, temperature=0.3
            )
        (choice,) = response.choices
        assert (choice.finish_reason, choice.message.content) == ("length", "Oslo")
        assert "".join(one.token for one in choice.logprobs.content) == "Oslo"
        assert {one.logprob for one in choice.logprobs.content} == {-0.5}
        assert bench.context.metrics == {"session_ignored/temperature": 1.0}

    play(test)


def test_log_probs_of_every_api(play: Play) -> None:
    """Completions count further tokens at each place, so 0 asks for the sampled ones; responses name them."""

    async def test(bench: Bench) -> None:
        async with bench.open(*["Oslo<|im_end|>"] * 3) as client:
            text = await client.completions.create(model="a", prompt="In", logprobs=0)
            assert text.choices[0].logprobs.tokens[-1] == "<|im_end|>"
            asked: Any = {"model": "a", "include": ["message.output_text.logprobs"]}
            item = (await client.responses.create(input="Hi", **asked)).output[0].content[0]
            assert "".join(one.token for one in item.logprobs) == "Oslo<|im_end|>"
            parts = [part async for part in await client.responses.create(input="So", stream=True, **asked)]
            (done,) = (part for part in parts if part.type == "response.output_text.done")
            assert {one.logprob for one in done.logprobs} == {-0.5}

    play(test)


def test_settings_of_other_servers_are_counted(play: Play) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("Oslo<|im_end|>") as client:
            further = {"repetition_penalty": 1.2, "chat_template_kwargs": {"enable_thinking": False}, "user": "me"}
            await client.chat.completions.create(model="a", messages=[USER], extra_body=further)
        assert bench.context.metrics == {
            "session_ignored/repetition_penalty": 1.0,
            "session_ignored/chat_template_kwargs": 1.0,
        }

    play(test)


def test_a_history_that_ends_with_the_policy_s_message(play: Play) -> None:
    """Nobody has said anything since: the policy says a further message, behind the tokens of its last one."""

    async def test(bench: Bench) -> None:
        async with bench.open("One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>") as client:
            messages: list[Any] = [USER]
            for _ in range(3):
                said = await client.chat.completions.create(model="a", messages=messages)
                messages.append({"role": "assistant", "content": said.choices[0].message.content})
        (trajectory,) = bench.session.trajectories
        assert trajectory.turns == 3
        text = bench.context.decode(trajectory.tokens)
        assert text.endswith(
            "One.<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>assistant\nThree.<|im_end|>"
        )

    play(test)


def test_a_stop_string_is_left_out_and_may_be_sent_back(play: Play) -> None:
    async def test(bench: Bench) -> None:
        async with bench.open("x = 1</code> ", "Done.<|im_end|>") as client:
            first = await client.chat.completions.create(model="a", messages=[USER], stop=["</code>", "###"])
            assert first.choices[0].message.content == "x = 1"
            said = {"role": "assistant", "content": "x = 1</code>"}
            await client.chat.completions.create(model="a", messages=[USER, said, USER])
        (trajectory,) = bench.session.trajectories
        assert "x = 1</code> <|im_end|>\n<|im_start|>user" in bench.context.decode(trajectory.tokens)

    play(test)


def test_curl(play: Play) -> None:
    async def curl(bench: Bench, *arguments: str) -> str:
        command = ["curl", "-sS", "-H", f"Authorization: Bearer {bench.session.api_key}", *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return output.decode()

    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>", "Hello.<|im_end|>"):
            url = bench.session.base_url
            assert json.loads(await curl(bench, f"{url}/models"))["data"][0]["id"] == "policy"
            body = json.dumps({"messages": [USER]})
            response = json.loads(await curl(bench, f"{url}/chat/completions", "-d", body))
            assert response["choices"][0]["message"] == {"role": "assistant", "content": "Hello."}
            large = json.dumps({"messages": [{"role": "user", "content": "so " * 20_000}], "stream": True})
            lines = (await curl(bench, f"{url}/chat/completions", "-d", large)).splitlines()
            events = [line.removeprefix("data: ") for line in lines if line]
            assert events[-1] == "[DONE]"
            assert [json.loads(one)["choices"][0]["delta"] for one in events[:-1]] == [
                {"role": "assistant", "content": ""}, {"content": "Hello."}, {},
            ]  # fmt: skip

    play(test)


def test_a_client_that_left_comes_back(play: Play) -> None:
    """What the policy was asked for is sampled once, whatever becomes of the connection."""

    async def test(bench: Bench) -> None:
        async with bench.open("Hello.<|im_end|>") as client:
            bench.context.free.clear()
            body = json.dumps({"messages": [USER], "model": "a", "stream": True}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
            writer.write(bench.head(len(body)) + body)
            await bench.context.asked.wait()
            writer.transport.abort()
            again = asyncio.ensure_future(client.chat.completions.create(model="a", messages=[USER]))
            while not bench.context.metrics:
                await asyncio.sleep(0.01)
            bench.context.free.set()
            assert (await again).choices[0].message.content == "Hello."
        assert len(bench.context.paths) == len(bench.session.trajectories) == 1
        assert bench.context.metrics == {"session_repeats": 1.0}

    play(test)


def test_seeds_do_not_depend_on_time(play: Play) -> None:
    """Turns have the same paths whichever request comes first, and trajectories the same order where they are sent at
    the same time."""

    async def paths(bench: Bench, numbers: Sequence[int]) -> tuple[dict[int, str], list[str]]:
        async with bench.open(*["Hello.<|im_end|>"] * 4) as client:
            bench.context.free.clear()
            found, waiting = {}, []
            for number in numbers:
                bench.context.asked.clear()
                messages = [{"role": "user", "content": f"Part {number}"}]
                waiting.append(asyncio.ensure_future(client.chat.completions.create(model="a", messages=messages)))
                await bench.context.asked.wait()
                found[number] = bench.context.paths[-1]
            bench.context.free.set()
            await asyncio.gather(*waiting)
        return found, [one.messages[0]["content"] for one in bench.session.trajectories]

    async def test(bench: Bench) -> None:
        forward, backward = await paths(bench, [0, 1, 2]), await paths(bench, [2, 0, 1])
        assert forward == backward
        assert len(set(forward[0].values())) == 3

    play(test)
