"""What supervised and preference learning train on: a prompt with one response or with two, or conversations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import TypeVar

import msgspec
import numpy as np

from miles_spmd.config import DataConfig
from miles_spmd.data.chat import assistant_segments, has_content
from miles_spmd.data.dataset import Row, RowError, TooLongError, load_items
from miles_spmd.data.prompts import (
    check_length,
    read_input,
    read_label,
    read_text,
    render_prompt,
    template_errors,
    to_conversation,
)
from miles_spmd.data.template import Conversation, Message, TokenizerError
from miles_spmd.data.tokenizer import Encoding, Text, Tokenizer

Item = TypeVar("Item")
Turns = str | list[Message]  # a response as text, or as messages that continue those of the prompt


class SftExample(msgspec.Struct, frozen=True):
    """One sequence; arrays have its length T. ``loss_mask`` divided by the loss's denominator gives the
    ``loss_weights`` of a ``TrainSequence``."""

    uid: str
    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # float32, 1 on the assistant's tokens and the end of sequence


class PreferencePair(msgspec.Struct, frozen=True):
    """Two sequences with the same prompt, on which their masks are 0."""

    uid: str
    chosen: SftExample
    rejected: SftExample


def load_sft_examples(data: DataConfig, tokenizer: Tokenizer, *, max_len: int | None = None) -> list[SftExample]:
    """Return every example of ``data.prompt_data``, tokenized and with end of sequence. ``max_len`` is in tokens.

    Of input messages that end with the assistant's, all assistant turns are trained; any other input is a prompt whose
    response is the label column.

    Raises DataError with all errors of the file, as ``load_prompts`` does.
    """

    def texts(row: Row) -> list[Text]:
        value = read_input(row, data)
        if isinstance(value, Conversation) and value.messages[-1]["role"] == "assistant":
            return [_conversation_text(value, 0, tokenizer)]
        response = read_label(row, data.label_key)
        if not isinstance(response, str) or not response.strip():
            remedy = "give the response as a string in data.label_key, or end the messages with the assistant's"
            raise RowError(f"the response {response!r} is not a non-empty string", remedy)
        return [_response_text(value, response, tokenizer)]

    return _load(data.prompt_data, None, data, tokenizer, texts, lambda examples: examples[0], max_len)


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

    def pair(examples: list[SftExample]) -> PreferencePair:
        chosen, rejected = examples
        if np.array_equal(chosen.tokens, rejected.tokens):
            raise RowError(f"{data.chosen_key!r} and {data.rejected_key!r} are the same", "remove the row")
        return PreferencePair(chosen.uid, chosen, rejected)

    def texts(row: Row) -> list[Text]:
        prompt, *responses = _read_row(row, data)
        return [_text(row, prompt, response, data, tokenizer) for response in responses]

    return _load(prompt_data or data.prompt_data, name, data, tokenizer, texts, pair, max_len, scores_end)


def _read_row(row: Row, data: DataConfig) -> tuple[str | Conversation, Turns, Turns]:
    """Return prompt, preferred response and rejected response."""
    chosen = _read_response(row, data.chosen_key, "data.chosen_key")
    rejected = _read_response(row, data.rejected_key, "data.rejected_key")
    if isinstance(chosen, str) or isinstance(rejected, str) or chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = read_input(row, data)
        if isinstance(prompt, str) and isinstance(chosen, str) != isinstance(rejected, str):
            # One prompt would be plain text and the other one rendered by the chat template.
            problem = f"one of {data.chosen_key!r} and {data.rejected_key!r} is a string and the other one messages"
            raise RowError(problem, "write both in one form, or set data.apply_chat_template = true")
        return prompt, chosen, rejected
    # The last message is a response even if the other conversation continues after it.
    same = [a == b for a, b in zip(chosen[:-1], rejected[:-1])]
    shared = len(list(takewhile(bool, same)))
    if not shared:
        problem = f"{data.chosen_key!r} and {data.rejected_key!r} are conversations without a common beginning"
        raise RowError(problem, "begin both with the prompt, or both with the assistant's response to the input column")
    return to_conversation(row, chosen[:shared], data), chosen[shared:], rejected[shared:]


def _read_response(row: Row, key: str, setting: str) -> Turns:
    response = read_text(row, key, setting)
    if not isinstance(response, str):
        for message in response:
            if message["role"] == "assistant" and not has_content(message):
                raise RowError(f"{key!r} has an empty assistant message", "fill it in or remove the row")
        if response[-1]["role"] != "assistant":
            raise RowError(f"{key!r} does not end with the assistant's message", "remove what follows it")
    return response


def _text(row: Row, prompt: str | Conversation, response: Turns, data: DataConfig, tokenizer: Tokenizer) -> Text:
    if isinstance(response, str):
        return _response_text(prompt, response, tokenizer)
    if isinstance(prompt, str):
        prompt = to_conversation(row, [{"role": "user", "content": prompt}], data)
    before, after = prompt.messages[-1]["role"], response[0]["role"]
    if before == "assistant" or after != "assistant":
        problem = f"the response begins with a message of {after!r}, the prompt ends with one of {before!r}"
        raise RowError(problem, "end the prompt before the assistant's message, and begin the response with it")
    whole = prompt._replace(messages=prompt.messages + response)
    return _conversation_text(whole, len(prompt.messages), tokenizer)


def _response_text(prompt: str | Conversation, response: str, tokenizer: Tokenizer) -> Text:
    """Return a prompt and a response to it. Raises RowError."""
    return Text([(render_prompt(prompt, tokenizer), False), (response, True)], isinstance(prompt, Conversation))


def _conversation_text(conversation: Conversation, since: int, tokenizer: Tokenizer) -> Text:
    """Render a conversation up to its last assistant turn; turns from message ``since`` on are trained. Raises
    RowError."""
    with template_errors():
        segments = assistant_segments(tokenizer, conversation, since)
        exact = not tokenizer.chat_template.marks_assistant(conversation)
    while not segments[-1][1]:
        segments.pop()
    return Text(segments, True, exact)


def _load(
    source: str,
    name: str | None,
    data: DataConfig,
    tokenizer: Tokenizer,
    texts: Callable[[Row], list[Text]],
    join: Callable[[list[SftExample]], Item],
    max_len: int | None,
    scores_end: bool = False,
) -> list[Item]:
    """Return what ``join`` makes of the examples of every row's ``texts``, which end with a trained segment.

    Trained are the tokens from the first to the last that contain a character of a trained segment, as in
    transformers' ``apply_chat_template(return_assistant_tokens_mask=True)``, and an end of sequence; with
    ``scores_end`` only a second end of sequence.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TokenizerError(f"{tokenizer.folder} names no eos_token, without which a model cannot learn to stop")

    def example(uid: str, text: Text, encoding: Encoding) -> SftExample:
        (tokens, offsets), position = encoding, 0
        starts, ends = offsets.T
        mask = np.zeros(len(tokens), np.float32)
        for piece, trained in text.segments:
            inside = np.flatnonzero((starts < position + len(piece)) & (ends > position))
            span = slice(inside[0], inside[-1] + 1) if len(inside) else slice(0)
            mask[span] = trained
            position += len(piece)
        check_length(int(mask.argmax()), data.rollout_max_prompt_len)
        if eos not in tokens[span]:
            tokens, mask = [*tokens, eos], np.append(mask, np.float32(1))
        if scores_end:
            end = len(tokens) - tokens[::-1].index(eos)  # a template may count a line feed after it as the assistant's
            tokens = [*tokens[:end], eos]
            mask = np.eye(1, end + 1, end, dtype=np.float32)[0]
        if max_len is not None and len(tokens) > max_len:
            problem = f"the example has {len(tokens)} tokens, more than {max_len}"
            raise TooLongError(problem, "shorten it or raise the limit")
        return SftExample(uid, np.asarray(tokens, np.int32), mask)

    def draft(uid: str, row: Row) -> tuple[list[Text], Callable[..., Item]]:
        own = texts(row)
        return own, lambda *encodings: join([example(uid, *both) for both in zip(own, encodings)])

    return load_items(source, name, data, tokenizer, draft)
