"""Supervised examples: a prompt with its response, or a conversation of which the assistant's turns are trained."""

from __future__ import annotations

import msgspec
import numpy as np

from miles_spmd.config import DataConfig
from miles_spmd.data.chat import assistant_segments
from miles_spmd.data.dataset import Row, RowError, load_items, parse_slice
from miles_spmd.data.prompts import length_error, read_input, read_label, render_prompt
from miles_spmd.data.tokenizer import Message, Tokenizer, TokenizerError

Pieces = list[tuple[list[int], bool]]  # token ids in order, and whether they are trained; the first is the prompt


class SftExample(msgspec.Struct, frozen=True):
    """One sequence; arrays have its length T. ``loss_mask`` divided by the loss's denominator gives the
    ``loss_weights`` of a ``TrainSequence``."""

    uid: str
    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # float32, 1 on the assistant's tokens and the end of sequence


def load_sft_examples(data: DataConfig, tokenizer: Tokenizer, *, max_len: int | None = None) -> list[SftExample]:
    """Return every example of ``data.prompt_data``, tokenized and with end of sequence. ``max_len`` is in tokens.

    Of input messages that end with the assistant's, all assistant turns are trained; any other input is a prompt whose
    response is the label column. Prompt and response are tokenized separately, as they are when an engine generates.

    Raises DataError with all errors of the file, as ``load_prompts`` does.
    """

    file = parse_slice(data.prompt_data)[0].name

    def example(number: int, row: Row) -> SftExample | None:
        pieces = _row_pieces(row, data, tokenizer)
        return join_pieces(f"{file}:{number}", pieces) if pieces_fit(pieces, data, max_len) else None

    return load_items(data.prompt_data, example)


def _row_pieces(row: Row, data: DataConfig, tokenizer: Tokenizer) -> Pieces:
    value = read_input(row, data)
    if isinstance(value, list) and value[-1]["role"] == "assistant":
        return conversation_pieces(value, 0, tokenizer)
    response = read_label(row, data.label_key, required=True)
    if not isinstance(response, str) or not response.strip():
        remedy = "give the response as a string in data.label_key, or end the messages with the assistant's"
        raise RowError(f"the response {response!r} is not a non-empty string", remedy)
    return response_pieces(value, response, tokenizer)


def response_pieces(prompt: str | list[Message], response: str, tokenizer: Tokenizer) -> Pieces:
    """Tokenize a prompt and a response to it, with end of sequence. Raises RowError."""
    text = render_prompt(prompt, tokenizer)
    ids = tokenizer.encode_prompts([text], [isinstance(prompt, list)])[0]
    return [(ids, False), ([*tokenizer.encode(response), end_of_sequence(tokenizer)], True)]


def conversation_pieces(messages: list[Message], since: int, tokenizer: Tokenizer) -> Pieces:
    """Tokenize a conversation up to its last assistant turn; turns from message ``since`` on are trained. Raises
    RowError."""
    eos = end_of_sequence(tokenizer)
    try:
        segments = assistant_segments(tokenizer, messages, since)
    except TokenizerError as error:
        raise RowError(str(error), "fix the messages or the template") from error
    pieces = [(tokenizer.encode(text), trained) for text, trained in segments]
    last = max(i for i, (_, trained) in enumerate(pieces) if trained)
    if eos not in pieces[last][0]:
        pieces[last] = ([*pieces[last][0], eos], True)
    return pieces[: last + 1]


def end_of_sequence(tokenizer: Tokenizer) -> int:
    """Return the id of the end-of-sequence token. Raises TokenizerError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"{tokenizer.folder} names no eos_token, without which a model cannot learn to stop")
    return tokenizer.eos_token_id


def pieces_fit(pieces: Pieces, data: DataConfig, max_len: int | None) -> bool:
    """Return whether the example is within the limits. If not, raises RowError unless ``data.drop_long_prompts``."""
    length = sum(len(ids) for ids, _ in pieces)
    error = length_error(len(pieces[0][0]), data.rollout_max_prompt_len, None)
    if error is None and max_len is not None and length > max_len:
        error = RowError(f"the example has {length} tokens, more than {max_len}", "shorten it or raise the limit")
    if error is not None and not data.drop_long_prompts:
        raise error
    return error is None


def join_pieces(uid: str, pieces: Pieces) -> SftExample:
    """Concatenate the pieces of one example."""
    return SftExample(
        uid,
        np.concatenate([np.asarray(ids, np.int32) for ids, _ in pieces]),
        np.concatenate([np.full(len(ids), trained, np.float32) for ids, trained in pieces]),
    )
