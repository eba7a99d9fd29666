"""From the rows of a dataset to prompts: text, tokens, label and metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from miles_spmd.config import DataConfig
from miles_spmd.data.chat import check_messages
from miles_spmd.data.dataset import FileError, Row, RowError, TooLongError, decode_json, load_items, lookup
from miles_spmd.data.template import (
    Conversation,
    Message,
    TemplateError,
    UnusableTemplateError,
    check_arguments,
    fixed_clock,
)
from miles_spmd.data.tokenizer import Encoding, Text, Tokenizer
from miles_spmd.types.sample import Prompt

_ARGUMENTS = "chat_template_kwargs"  # column; TRL's datasets call it so, too


def load_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    prompt_data: str | None = None,
    name: str | None = None,
    room: int | None = None,
    check_label: Callable[[Any], str | None] | None = None,
) -> list[Prompt]:
    """Return every prompt of ``prompt_data`` (default: ``data.prompt_data``), tokenized.

    A prompt's uid is ``name:row`` (default name: the file's), with rows counted from 1, as lines of JSONL are.
    ``metadata`` has the row's other columns, overridden by the contents of the metadata column; and if the chat
    template was applied, the conversation under ``messages`` and the template's variables under
    ``chat_template_kwargs``.
    ``room`` is the number of prompt tokens that fit into the context together with a full response. ``check_label``
    returns why a label cannot be used, None for one that can.

    Raises DataError with all errors of the file: rows that are not JSON, missing keys, wrong types, empty and too long
    prompts, labels that the reward cannot read, no row at all.
    """

    def draft(uid: str, row: Row) -> tuple[list[Text], Callable[[Encoding], Prompt]]:
        value = read_input(row, data)
        label, text = read_label(row, data.label_key), render_prompt(value, tokenizer)
        metadata = read_metadata(row, data, value)
        if check_label is not None and (problem := check_label(label)) is not None:
            if not data.label_key:  # no row has one
                raise FileError(problem, "name the labels' column (label_key), or another reward (rm_type)")
            raise RowError(problem, "correct it, or name another column (label_key) or reward (rm_type)")

        def finish(encoding: Encoding) -> Prompt:
            if not encoding.ids:
                raise RowError("the prompt has no tokens", "fill it in or remove the row")
            check_length(len(encoding.ids), data.rollout_max_prompt_len, room)
            return Prompt(uid, text, encoding.ids, label, metadata)

        return [Text([(text, False)], isinstance(value, Conversation))], finish

    return load_items(prompt_data or data.prompt_data, name, data, tokenizer, draft)


def render_prompt(value: str | Conversation, tokenizer: Tokenizer) -> str:
    """Return the model's input: plain text as it is, a conversation by the chat template. Raises RowError."""
    if isinstance(value, str):
        return value
    if value.messages[-1]["role"] == "assistant":
        raise RowError("the last message is the assistant's", "end a prompt with a user, tool or system message")
    with template_errors():
        return tokenizer.chat_template.render(value, add_generation_prompt=True)[0]


@contextmanager
def template_errors() -> Iterator[None]:
    """Raise what the chat template raises as a RowError: one of the whole file where no row can be rendered."""
    try:
        yield
    except UnusableTemplateError as error:
        raise FileError(str(error), "or use the checkpoint of a chat model") from error
    except TemplateError as error:
        raise RowError(str(error), "fix the messages or the template") from error


def read_input(row: Row, data: DataConfig) -> str | Conversation:
    """Return the input column: plain text, or a conversation, also for plain text with ``data.apply_chat_template``.
    Raises RowError."""
    value = read_text(row, data.input_key, "data.input_key")
    if isinstance(value, str):
        if not data.apply_chat_template:
            if data.system_prompt:
                problem = f"{data.input_key!r} is a plain string, which has no place for data.system_prompt"
                raise FileError(problem, "set data.apply_chat_template = true, or leave data.system_prompt out")
            return value
        value = [{"role": "user", "content": value}]
    return to_conversation(row, value, data)


def to_conversation(row: Row, messages: list[Message], data: DataConfig) -> Conversation:
    """Return messages of a row with the run's system prompt, and the row's tools and variables of the template. Raises
    RowError."""
    if data.system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    tools = _read_json_column(row, data.tool_key) if data.tool_key else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError(f"{data.tool_key!r} is not a list of objects", "write JSON schemas or set data.tool_key")
    own = _read_json_column(row, _ARGUMENTS)
    try:
        own = {} if own is None else check_arguments(own)
    except TypeError as error:
        raise RowError(f"{_ARGUMENTS!r}: {error}", "write an object of the template's variables") from None
    arguments = data.chat_template_kwargs | {key: value for key, value in own.items() if value is not None}
    return Conversation(messages, tools or None, {**arguments, "strftime_now": fixed_clock(data.chat_template_date)})


def _read_json_column(row: Row, key: str) -> Any:
    """Return a column that may be JSON text, None if the row does not have it. Raises RowError."""
    value = row.get(key)
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value.encode()) if value.strip() else None
    except ValueError as error:
        raise RowError(f"{key!r} is not JSON ({error})", "write JSON, or an object instead of text") from None


def read_text(row: Row, key: str, setting: str) -> str | list[Message]:
    """Return the text or messages of a column. Raises RowError, naming ``setting``, if missing, empty or malformed."""
    try:
        value = lookup(row, key)
    except KeyError:
        columns = ", ".join(row) or "none"
        raise RowError(f"missing key {key!r} (the row has: {columns})", f"add it or set {setting}") from None
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{key!r} is empty", "fill it in or remove the row")
        return value
    try:
        return check_messages(value)
    except TypeError as error:
        kind = type(value).__name__
        raise RowError(f"{key!r} ({kind}): {error}", "write a string or [{'role': ..., 'content': ...}, ...]") from None


def read_label(row: Row, key: str | None) -> Any:
    if not key:
        return None
    try:
        return lookup(row, key)
    except KeyError:
        remedy = "add it or set data.label_key, to '' if nothing uses a label"
        raise RowError(f"missing key {key!r} (data.label_key)", remedy) from None


def read_metadata(row: Row, data: DataConfig, value: str | Conversation) -> dict[str, Any]:
    own = row.get(data.metadata_key) if data.metadata_key else None
    if own is not None and not isinstance(own, dict):
        raise RowError(f"{data.metadata_key!r} is {type(own).__name__}", "write an object or set data.metadata_key")
    metadata = {k: v for k, v in row.items() if k not in (data.input_key, data.metadata_key)} | (own or {})
    if isinstance(value, Conversation):
        metadata["messages"] = value.messages
        if variables := {key: each for key, each in value.arguments.items() if key != "strftime_now"}:
            metadata[_ARGUMENTS] = variables
    return metadata


def check_length(length: int, max_len: int | None, room: int | None = None) -> None:
    """Raise RowError if a prompt of ``length`` tokens is not within the limits."""
    remedy = "shorten it, raise the limit, or set data.drop_long_prompts = true"
    if max_len is not None and length > max_len:
        raise TooLongError(f"the prompt has {length} tokens, more than data.rollout_max_prompt_len = {max_len}", remedy)
    if room is not None and length > room:
        problem = f"the prompt has {length} tokens, of which {room} fit into the context together with a full response"
        raise TooLongError(problem, remedy)
