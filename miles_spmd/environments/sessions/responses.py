"""OpenAI's Responses API over the chat API: its items are messages in parts
(https://platform.openai.com/docs/api-reference/responses)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from miles_spmd.environments.sessions.chat import ChatMessage, ChatRequest, FunctionCall, Part, ToolCall, log_probs_of
from miles_spmd.environments.sessions.protocol import MODEL, RequestError, Response, event, read_json, usage

Body = dict[str, Any]
_ID = "resp-"  # what the id of a response begins with; the key of its request follows
_LOG_PROBS = "message.output_text.logprobs"
_INSTRUCTED = "-i"  # and what it ends with where the first message is the request's instructions


class Item(msgspec.Struct):
    """A message, a call, its result, or reasoning, by its ``type``; without one it is a message."""

    type: str = "message"
    role: str = ""
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str = ""
    arguments: str = "{}"
    output: str | list[Part] | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """``include`` asks for log-probs. Further fields have no effect."""

    input: str | list[Item]
    model: str = MODEL
    instructions: str | None = None
    tools: list[Body] | None = None
    tool_choice: str | Body | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    text: Body | None = None
    previous_response_id: str | None = None
    seed: int | None = None
    temperature: Any = None
    top_p: Any = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def asks_log_probs(self) -> bool:
        return _LOG_PROBS in (self.include or ())

    def asked(self, conversation: Callable[[str], list[Body] | None]) -> ChatRequest:
        """Return the same request of the chat API. ``conversation``: see SampledRequest. Raises RequestError."""
        for name in ("conversation", "prompt"):  # of which there are none here
            if getattr(self, name) is not None:
                raise RequestError(400, f"{name} is not supported; send all that the policy is to see", param=name)
        form = (self.text or {}).get("format")
        request = ChatRequest(
            messages=self._messages(self._before(conversation)),
            model=self.model,
            tools=[_tool(tool) for tool in self.tools or ()] or None,
            tool_choice=self.tool_choice,
            max_completion_tokens=self.max_output_tokens,
            response_format=form if isinstance(form, dict) else None,
            seed=self.seed,
            logprobs=self.asks_log_probs or None,
            top_logprobs=self.top_logprobs,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        request.check()
        return request

    def _before(self, conversation: Callable[[str], list[Body] | None]) -> list[ChatMessage]:
        """Return the messages before the input: those up to the previous response, without its instructions, which
        OpenAI's API does not carry over. Raises RequestError."""
        if (name := self.previous_response_id) is None:
            return []
        key = name.removeprefix(_ID).removesuffix(_INSTRUCTED)
        found = conversation(key) if name.startswith(_ID) else None
        if found is None:
            raise RequestError(
                400,
                f"previous response with id {name!r:.80} is not one of this session",
                "previous_response_not_found",
                "previous_response_id",
            )
        return msgspec.convert(found[name.endswith(_INSTRUCTED) :], list[ChatMessage])

    def _messages(self, before: Sequence[ChatMessage]) -> list[ChatMessage]:
        messages = [ChatMessage("system", self.instructions)] if self.instructions else []
        messages += before
        if isinstance(self.input, str):
            return [*messages, ChatMessage("user", self.input)]
        said: ChatMessage | None = None  # of the assistant, of which more items may follow
        for item in self.input:
            match item.type:
                case "message" if item.role != "assistant":
                    said = None
                    messages.append(ChatMessage(item.role, item.content))
                case "function_call_output":
                    said = None
                    messages.append(ChatMessage("tool", item.output, tool_call_id=item.call_id))
                case "message" | "reasoning" | "function_call":
                    if said is None or not _belongs(item, said):
                        said = ChatMessage("assistant")
                        messages.append(said)
                    _add(item, said)
                case other:
                    raise RequestError(400, f"an item of the type {other!r} is not supported", param="input")
        return messages


def decode(body: bytes) -> ResponsesRequest:
    """Raises RequestError."""
    return read_json(body, ResponsesRequest)


def whole(request: ResponsesRequest, response: Response) -> Body:
    """Return the body of a response that is not streamed."""
    return _body(request, response, _items(request, response), response.choices[0].finish_reason)


def events(request: ResponsesRequest, response: Response) -> Iterator[bytes]:
    """Yield the events of a streamed response. The policy's message is complete before the first one."""
    items, numbers = _items(request, response), itertools.count()

    def made(kind: str, **fields: Any) -> bytes:
        kind = f"response.{kind}"
        return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    yield made("created", response=_body(request, response, [], None))
    for place, item in enumerate(items):
        where = {"item_id": item["id"], "output_index": place}
        started = item | {"status": "in_progress"} | {name: [] for name in ("content",) if name in item}
        started |= {"arguments": ""} if item["type"] == "function_call" else {}
        yield made("output_item.added", output_index=place, item=started)
        if item["type"] == "function_call":
            yield made("function_call_arguments.delta", **where, delta=item["arguments"])
            yield made("function_call_arguments.done", **where, name=item["name"], arguments=item["arguments"])
        elif item["type"] == "message":
            part: Body = item["content"][0]
            inside = where | {"content_index": 0}
            yield made("content_part.added", **inside, part=part | {"text": "", "logprobs": []})
            yield made("output_text.delta", **inside, delta=part["text"], logprobs=part["logprobs"])
            yield made("output_text.done", **inside, text=part["text"], logprobs=part["logprobs"])
            yield made("content_part.done", **inside, part=part)
        yield made("output_item.done", output_index=place, item=item)
    final = whole(request, response)
    yield made("incomplete" if final["status"] == "incomplete" else "completed", response=final)


def _belongs(item: Item, said: ChatMessage) -> bool:
    """Whether an item is of the same message of the assistant: reasoning, then content, then calls."""
    if item.type == "function_call":
        return True
    has_reasoning = said.reasoning_content is not None
    return not said.tool_calls and said.content is None and not (item.type == "reasoning" and has_reasoning)


def _add(item: Item, said: ChatMessage) -> None:
    if item.type == "message":
        said.content = item.content
    elif item.type == "reasoning":
        said.reasoning_content = ChatMessage("assistant", item.content).text
    else:
        call = ToolCall(FunctionCall(item.name, item.arguments), item.call_id)
        said.tool_calls = [*(said.tool_calls or ()), call]


def _tool(tool: Body) -> Body:
    """Return a tool as the chat API has it."""
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": tool.get("type"), "function": function}


def _items(request: ResponsesRequest, response: Response) -> list[Body]:
    message, key = response.choices[0].message, response.key
    log_probs = log_probs_of(response.choices[0]) if request.asks_log_probs else []
    items: list[Body] = []
    if reasoning := message.get("reasoning_content"):
        content = [{"type": "reasoning_text", "text": reasoning}]
        items.append({"type": "reasoning", "id": f"rs-{key}", "summary": [], "content": content})
    if (text := message["content"]) or not message.get("tool_calls"):
        part: Body = {"type": "output_text", "text": text or "", "annotations": [], "logprobs": log_probs}
        items.append(
            {"type": "message", "id": f"msg-{key}", "status": "completed", "role": "assistant", "content": [part]}
        )
    items += [
        {"type": "function_call", "id": f"fc-{key}-{i}", "status": "completed", "call_id": call["id"]}
        | call["function"]
        for i, call in enumerate(message.get("tool_calls", ()))
    ]
    return items


def _body(request: ResponsesRequest, response: Response, items: list[Body], finish_reason: str | None) -> Body:
    """``finish_reason``: None while nothing is there."""
    status = {None: "in_progress", "length": "incomplete"}.get(finish_reason, "completed")
    counts = usage(response)
    prompt, sampled = counts["prompt_tokens"], counts["completion_tokens"]
    return {
        "id": f"{_ID}{response.key}{_INSTRUCTED if request.instructions else ''}",
        "object": "response",
        "created_at": 0,
        "model": request.model,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.instructions,
        "output": items,
        "tools": request.tools or [],
        "tool_choice": request.tool_choice or "auto",
        "parallel_tool_calls": True,
        "previous_response_id": request.previous_response_id,
        "temperature": None,
        "top_p": None,
        "metadata": response.fingerprint,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": sampled,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + sampled,
        },
    }
