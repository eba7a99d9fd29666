"""From the rows of a dataset to prompts: text, tokens, label and metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles_spmd.config import DataConfig
from miles_spmd.data.chat import check_messages
from miles_spmd.data.dataset import Row, RowError, TooLongError, load_items, lookup
from miles_spmd.data.tokenizer import Encoding, Message, Text, Tokenizer, TokenizerError
from miles_spmd.types.sample import Prompt


def load_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    prompt_data: str | None = None,
    name: str | None = None,
    room: int | None = None,
) -> list[Prompt]:
    """Return every prompt of ``prompt_data`` (default: ``data.prompt_data``), tokenized.

    A prompt's uid is ``name:row`` (default name: the file's), with rows counted from 1, as lines of JSONL are.
    ``metadata`` has the row's other columns, overridden by the contents of the metadata column, and under ``messages``
    the conversation if the chat template was applied. ``room`` is the number of prompt tokens that fit into the context
    together with a full response.

    Raises DataError with all errors of the file: rows that are not JSON, missing keys, wrong types, empty and too long
    prompts, no row at all.
    """

    def draft(uid: str, row: Row) -> tuple[list[Text], Callable[[Encoding], Prompt]]:
        value = read_input(row, data)
        messages = value if isinstance(value, list) else None
        label, text = read_label(row, data.label_key), render_prompt(value, tokenizer)
        metadata = read_metadata(row, data, messages)

        def finish(encoding: Encoding) -> Prompt:
            if not encoding.ids:
                raise RowError("the prompt has no tokens", "fill it in or remove the row")
            check_length(len(encoding.ids), data.rollout_max_prompt_len, room)
            return Prompt(uid, text, encoding.ids, label, metadata)

        return [Text([(text, False)], messages is not None)], finish

    return load_items(prompt_data or data.prompt_data, name, data, tokenizer, draft)


def render_prompt(value: str | list[Message], tokenizer: Tokenizer) -> str:
    """Return the model's input: plain text as it is, messages by the chat template. Raises RowError."""
    if isinstance(value, str):
        return value
    if value[-1]["role"] == "assistant":
        raise RowError("the last message is the assistant's", "end a prompt with a user, tool or system message")
    try:
        return tokenizer.render(value)
    except TokenizerError as error:
        raise RowError(str(error), "fix the messages or the template") from error


def read_input(row: Row, data: DataConfig) -> str | list[Message]:
    """Return the input column: plain text, or messages, also for plain text with ``data.apply_chat_template``."""
    value = read_text(row, data.input_key, "data.input_key")
    return [{"role": "user", "content": value}] if isinstance(value, str) and data.apply_chat_template else value


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
        remedy = "add it, set data.label_key, or set it to '' if the reward does not use a label"
        raise RowError(f"missing key {key!r} (data.label_key)", remedy) from None


def read_metadata(row: Row, data: DataConfig, messages: list[Message] | None) -> dict[str, Any]:
    own = row.get(data.metadata_key) if data.metadata_key else None
    if own is not None and not isinstance(own, dict):
        raise RowError(f"{data.metadata_key!r} is {type(own).__name__}", "write an object or set data.metadata_key")
    metadata = {k: v for k, v in row.items() if k not in (data.input_key, data.metadata_key)} | (own or {})
    if messages is not None:
        metadata["messages"] = messages
    return metadata


def check_length(length: int, max_len: int | None, room: int | None = None) -> None:
    """Raise RowError if a prompt of ``length`` tokens is not within the limits."""
    remedy = "shorten it, raise the limit, or set data.drop_long_prompts = true"
    if max_len is not None and length > max_len:
        raise TooLongError(f"the prompt has {length} tokens, more than data.rollout_max_prompt_len = {max_len}", remedy)
    if room is not None and length > room:
        problem = f"the prompt has {length} tokens, of which {room} fit into the context together with a full response"
        raise TooLongError(problem, remedy)
