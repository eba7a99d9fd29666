"""Supervised examples: a prompt with its response, or a conversation of which the assistant's turns are trained."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from tokenizers import Encoding

from miles_spmd.config import DataConfig
from miles_spmd.data.chat import assistant_segments
from miles_spmd.data.dataset import Row, RowError, TooLongError, load_items
from miles_spmd.data.prompts import check_length, read_input, read_label, render_prompt
from miles_spmd.data.tokenizer import Message, Text, Tokenizer, TokenizerError


class SftExample(msgspec.Struct, frozen=True):
    """One sequence; arrays have its length T. ``loss_mask`` divided by the loss's denominator gives the
    ``loss_weights`` of a ``TrainSequence``."""

    uid: str
    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # float32, 1 on the assistant's tokens and the end of sequence


def load_sft_examples(data: DataConfig, tokenizer: Tokenizer, *, max_len: int | None = None) -> list[SftExample]:
    """Return every example of ``data.prompt_data``, tokenized and with end of sequence. ``max_len`` is in tokens.

    Of input messages that end with the assistant's, all assistant turns are trained; any other input is a prompt whose
    response is the label column.

    Raises DataError with all errors of the file, as ``load_prompts`` does.
    """

    def draft(uid: str, row: Row) -> tuple[list[Text], Callable[[Encoding], SftExample]]:
        value = read_input(row, data)
        if isinstance(value, list) and value[-1]["role"] == "assistant":
            text = conversation_text(value, 0, tokenizer)
        else:
            response = read_label(row, data.label_key)
            if not isinstance(response, str) or not response.strip():
                remedy = "give the response as a string in data.label_key, or end the messages with the assistant's"
                raise RowError(f"the response {response!r} is not a non-empty string", remedy)
            text = response_text(value, response, tokenizer)
        return [text], lambda encoding: make_example(uid, text, encoding, tokenizer, data, max_len)

    return load_items(data.prompt_data, None, data, tokenizer, draft)


def response_text(prompt: str | list[Message], response: str, tokenizer: Tokenizer) -> Text:
    """Return a prompt and a response to it. Raises RowError."""
    return Text([(render_prompt(prompt, tokenizer), False), (response, True)], isinstance(prompt, list))


def conversation_text(messages: list[Message], since: int, tokenizer: Tokenizer) -> Text:
    """Render a conversation up to its last assistant turn; turns from message ``since`` on are trained. Raises
    RowError."""
    try:
        segments = assistant_segments(tokenizer, messages, since)
    except TokenizerError as error:
        raise RowError(str(error), "fix the messages or the template") from error
    while not segments[-1][1]:
        segments.pop()
    return Text(segments, True)


def make_example(
    uid: str,
    text: Text,
    encoding: Encoding,
    tokenizer: Tokenizer,
    data: DataConfig,
    max_len: int | None,
    scores_end: bool = False,
) -> SftExample:
    """Return the example of a text that ends with a trained segment, with the end of sequence.

    Trained are the tokens from the first to the last that contain a character of a trained segment, as in
    transformers' ``apply_chat_template(return_assistant_tokens_mask=True)``; with ``scores_end`` only a second
    end-of-sequence token. Raises RowError if it is not within the limits.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TokenizerError(f"{tokenizer.folder} names no eos_token, without which a model cannot learn to stop")
    tokens, position = encoding.ids, 0
    starts, ends = np.asarray(encoding.offsets).reshape(-1, 2).T  # characters of the text
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
