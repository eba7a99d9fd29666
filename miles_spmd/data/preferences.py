"""Pairs of a preferred and a rejected response to the same prompt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

import msgspec
import numpy as np
from tokenizers import Encoding

from miles_spmd.config import DataConfig
from miles_spmd.data.dataset import Row, RowError, load_items
from miles_spmd.data.prompts import read_input, read_text
from miles_spmd.data.sft import SftExample, conversation_text, make_example, response_text
from miles_spmd.data.tokenizer import Message, Text, Tokenizer

Turns = str | list[Message]  # a response as text, or as messages that continue those of the prompt


class PreferencePair(msgspec.Struct, frozen=True):
    """Two sequences with the same prompt, on which their masks are 0."""

    uid: str
    chosen: SftExample
    rejected: SftExample


def load_preference_pairs(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    prompt_data: str | None = None,
    name: str | None = None,
    max_len: int | None = None,
    scores_end: bool = False,
) -> list[PreferencePair]:
    """Return every pair of ``prompt_data`` (default: ``data.prompt_data``), tokenized as supervised examples are.

    The columns ``data.chosen_key`` and ``data.rejected_key`` contain a string, or messages that continue those of the
    input, the first and last of which are the assistant's. Messages that begin with another role are whole
    conversations: the turns that both share are the prompt, and the input column is not read. A uid is ``name:row``
    (default name: the file's); ``max_len`` is in tokens of one sequence.

    With ``scores_end``, for training a reward model, each sequence has a second end-of-sequence token, and the mask is
    1 on it alone: the output for token t is computed from the hidden state at t - 1, which then is the state at the
    end of sequence.

    Raises DataError with all errors of the file: missing columns, empty or equal responses, conversations that share no
    beginning, sequences that are too long unless ``data.drop_long_prompts``.
    """

    def draft(uid: str, row: Row) -> tuple[list[Text], Callable[..., PreferencePair]]:
        prompt, *responses = _read_row(row, data)

        texts = [_text(prompt, response, tokenizer) for response in responses]

        def finish(*encodings: Encoding) -> PreferencePair:
            sides = [
                make_example(uid, text, encoding, tokenizer, data, max_len, scores_end)
                for text, encoding in zip(texts, encodings)
            ]
            if np.array_equal(sides[0].tokens, sides[1].tokens):
                raise RowError(f"{data.chosen_key!r} and {data.rejected_key!r} are the same", "remove the row")
            return PreferencePair(uid, *sides)

        return texts, finish

    return load_items(prompt_data or data.prompt_data, name, data, tokenizer, draft)


def _read_row(row: Row, data: DataConfig) -> tuple[Turns, Turns, Turns]:
    """Return prompt, preferred response and rejected response."""
    chosen = _read_response(row, data.chosen_key, "data.chosen_key")
    rejected = _read_response(row, data.rejected_key, "data.rejected_key")
    if isinstance(chosen, str) or isinstance(rejected, str) or chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return read_input(row, data), chosen, rejected
    # The last message is a response even if the other conversation continues after it.
    same = [a == b for a, b in zip(chosen[:-1], rejected[:-1])]
    shared = len(list(takewhile(bool, same)))
    if not shared:
        problem = f"{data.chosen_key!r} and {data.rejected_key!r} are conversations without a common beginning"
        raise RowError(problem, "begin both with the prompt, or both with the assistant's response to the input column")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _read_response(row: Row, key: str, setting: str) -> Turns:
    response = read_text(row, key, setting)
    if not isinstance(response, str):
        for message in response:
            content = message.get("content", "").strip() or message.get("tool_calls")
            if message["role"] == "assistant" and not content:
                raise RowError(f"{key!r} has an empty assistant message", "fill it in or remove the row")
        if response[-1]["role"] != "assistant":
            raise RowError(f"{key!r} does not end with the assistant's message", "remove what follows it")
    return response


def _text(prompt: Turns, response: Turns, tokenizer: Tokenizer) -> Text:
    if isinstance(response, str):
        return response_text(prompt, response, tokenizer)
    history = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    before, after = history[-1]["role"], response[0]["role"]
    if before == "assistant" or after != "assistant":
        problem = f"the response begins with a message of {after!r}, the prompt ends with one of {before!r}"
        raise RowError(problem, "end the prompt before the assistant's message, and begin the response with it")
    return conversation_text(history + response, len(history), tokenizer)
