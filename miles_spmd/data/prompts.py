"""Rows of a dataset as prompts: text, tokens, label and metadata, or what is wrong with them."""

from __future__ import annotations

import logging
from typing import Any

from miles_spmd.config import DataConfig
from miles_spmd.data.chat import check_messages
from miles_spmd.data.dataset import DataError, Fault, Row, lookup, parse_slice, read_rows
from miles_spmd.data.tokenizer import Message, Tokenizer, TokenizerError
from miles_spmd.types.sample import Prompt

_log = logging.getLogger(__name__)


class RowFault(ValueError):
    """What is wrong with one row and what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.fault = (problem, remedy)


def load_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    prompt_data: str | None = None,
    name: str | None = None,
    room: int | None = None,
    require_label: bool = True,
) -> list[Prompt]:
    """Every prompt of ``prompt_data`` (default: ``data.prompt_data``), tokenized.

    A prompt's uid is ``name:row`` (default name: the file's), its row counted from 1, so that for JSONL it is the line.
    ``metadata`` holds the row's other columns, the contents of the metadata column over them, and under ``messages``
    the conversation if the chat template was applied. ``room`` is the number of prompt tokens that fit into the context
    beside a full response.

    Raises DataError with all faults of the file: rows that are not JSON, missing keys, wrong types, empty and too long
    prompts, no row at all.
    """
    source = prompt_data or data.prompt_data
    path, _ = parse_slice(source)
    faults: list[Fault] = []
    drafts: list[tuple[int, str, bool, Any, dict[str, Any]]] = []
    for number, row in read_rows(source, faults):
        try:
            value = read_input(row, data)
            text, messages = render_prompt(value, tokenizer), value if isinstance(value, list) else None
            label = read_label(row, data.label_key, require_label)
            drafts.append((number, text, messages is not None, label, read_metadata(row, data, messages)))
        except RowFault as fault:
            faults.append(Fault(number, *fault.fault))
    token_lists = tokenizer.encode_prompts([d[1] for d in drafts], [d[2] for d in drafts])
    prompts = []
    dropped = 0
    for (number, text, _, label, metadata), tokens in zip(drafts, token_lists):
        problem = length_problem(len(tokens), data.rollout_max_prompt_len, room)
        if problem is None:
            prompts.append(Prompt(f"{name or path.name}:{number}", text, tokens, label, metadata))
        elif data.drop_long_prompts:
            dropped += 1
        else:
            faults.append(Fault(number, *problem))
    if dropped:
        _log.warning("%s: dropped %d of %d prompts as too long", source, dropped, len(drafts))
    raise_faults(source, faults, len(prompts))
    return prompts


def raise_faults(source: str, faults: list[Fault], usable: int) -> None:
    """Raise DataError if anything is wrong, an empty dataset included."""
    if not usable and not faults:
        faults = [Fault(None, "no rows", "check the file, its slice and data.drop_long_prompts")]
    if faults:
        raise DataError(source, sorted(faults, key=lambda f: f.row or 0))


def render_prompt(value: str | list[Message], tokenizer: Tokenizer) -> str:
    """The text that the model sees: plain text as it is, messages by the chat template. Raises RowFault."""
    if isinstance(value, str):
        return value
    if value[-1]["role"] == "assistant":
        raise RowFault("the last message is the assistant's", "end a prompt with a user, tool or system message")
    try:
        return tokenizer.render(value)
    except TokenizerError as error:
        raise RowFault(str(error), "mend the messages or the template") from error


def read_input(row: Row, data: DataConfig) -> str | list[Message]:
    """The input column: plain text, or messages (also plain text that the chat template is to wrap)."""
    value = read_text(row, data.input_key, "data.input_key")
    return [{"role": "user", "content": value}] if isinstance(value, str) and data.apply_chat_template else value


def read_text(row: Row, key: str, setting: str) -> str | list[Message]:
    """A column with text or messages, which ``setting`` names. Raises RowFault if it is missing, empty or malformed."""
    try:
        value = lookup(row, key)
    except KeyError:
        columns = ", ".join(row) or "none"
        raise RowFault(f"missing key {key!r} (the row has: {columns})", f"add it or set {setting}") from None
    if isinstance(value, str):
        if not value.strip():
            raise RowFault(f"{key!r} is empty", "fill it in or remove the row")
        return value
    try:
        return check_messages(value)
    except TypeError as error:
        kind = type(value).__name__
        raise RowFault(f"{key!r} ({kind}): {error}", "write a string or [{'role': ..., 'content': ...}, ...]") from None


def read_label(row: Row, key: str | None, required: bool) -> Any:
    if not key:
        return None
    try:
        return lookup(row, key)
    except KeyError:
        if not required:
            return None
        remedy = "add it, set data.label_key, or set it to '' if the reward needs no label"
        raise RowFault(f"missing key {key!r} (data.label_key)", remedy) from None


def read_metadata(row: Row, data: DataConfig, messages: list[Message] | None) -> dict[str, Any]:
    own = row.get(data.metadata_key) if data.metadata_key else None
    if own is not None and not isinstance(own, dict):
        raise RowFault(f"{data.metadata_key!r} is {type(own).__name__}", "write an object or set data.metadata_key")
    metadata = {k: v for k, v in row.items() if k not in (data.input_key, data.metadata_key)} | (own or {})
    if messages is not None:
        metadata["messages"] = messages
    return metadata


def length_problem(length: int, max_len: int | None, room: int | None) -> tuple[str, str] | None:
    """Problem and remedy of a prompt of ``length`` tokens, None if it is fine."""
    if not length:
        return "the prompt has no tokens", "fill it in or remove the row"
    if max_len is not None and length > max_len:
        problem = f"the prompt has {length} tokens, more than data.rollout_max_prompt_len = {max_len}"
    elif room is not None and length > room:
        problem = f"the prompt has {length} tokens, of which {room} fit into the context beside a full response"
    else:
        return None
    return problem, "shorten it, raise the limit, or set data.drop_long_prompts = true"
