"""Supervised examples: a prompt with its answer, or a conversation in which the assistant's turns are learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
import numpy as np

from miles_spmd.config import DataConfig
from miles_spmd.data.chat import assistant_segments
from miles_spmd.data.dataset import Fault, Row, parse_slice, read_rows
from miles_spmd.data.prompts import RowFault, length_problem, raise_faults, read_input, read_label, render_prompt
from miles_spmd.data.tokenizer import Message, Tokenizer, TokenizerError

Pieces = list[tuple[list[int], bool]]  # token ids in order, each piece with whether it is learned; first the prompt
Item = TypeVar("Item")


class SftExample(msgspec.Struct, frozen=True):
    """One sequence to learn; arrays of length T. ``loss_mask`` divided by the batch's sum of masks, or whatever the
    loss's denominator is, gives the ``loss_weights`` of a ``TrainSequence``."""

    uid: str
    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # float32, 1 on the assistant's tokens and the end of sequence


def load_sft_examples(data: DataConfig, tokenizer: Tokenizer, *, max_len: int | None = None) -> list[SftExample]:
    """Every example of ``data.prompt_data``, tokenized, end of sequence appended. ``max_len`` is in tokens.

    Input messages that end with the assistant's are learned in all assistant turns; any other input is a prompt whose
    answer is the label column. Prompt and answer are tokenized apart, as they are when an engine generates the answer.

    Raises DataError with all faults of the file, as ``load_prompts`` does.
    """

    def example(uid: str, row: Row) -> SftExample | None:
        pieces = _row_pieces(row, data, tokenizer)
        return join_pieces(uid, pieces) if pieces_fit(pieces, data, max_len) else None

    return load_items(data.prompt_data, None, example)


def load_items(source: str, name: str | None, make: Callable[[str, Row], Item | None]) -> list[Item]:
    """What ``make`` makes of each row and its uid (``name``, or else the file's, and the row's number).

    A row of which it makes None is left out. Its RowFaults are collected and raised as one DataError.
    """
    path, _ = parse_slice(source)
    faults: list[Fault] = []
    items = []
    for number, row in read_rows(source, faults):
        try:
            item = make(f"{name or path.name}:{number}", row)
        except RowFault as fault:
            faults.append(Fault(number, *fault.fault))
            continue
        if item is not None:
            items.append(item)
    raise_faults(source, faults, len(items))
    return items


def _row_pieces(row: Row, data: DataConfig, tokenizer: Tokenizer) -> Pieces:
    value = read_input(row, data)
    if isinstance(value, list) and value[-1]["role"] == "assistant":
        return conversation_pieces(value, 0, tokenizer)
    answer = read_label(row, data.label_key, required=True)
    if not isinstance(answer, str) or not answer.strip():
        remedy = "give the answer as a string in data.label_key, or end the messages with the assistant's"
        raise RowFault(f"the answer {answer!r} is not a non-empty string", remedy)
    return answer_pieces(value, answer, tokenizer)


def answer_pieces(prompt: str | list[Message], answer: str, tokenizer: Tokenizer) -> Pieces:
    """A prompt and the answer to it, with the end of sequence. Raises RowFault."""
    text = render_prompt(prompt, tokenizer)
    ids = tokenizer.encode_prompts([text], [isinstance(prompt, list)])[0]
    return [(ids, False), ([*tokenizer.encode(answer), end_of_sequence(tokenizer)], True)]


def conversation_pieces(messages: list[Message], since: int, tokenizer: Tokenizer) -> Pieces:
    """A conversation up to the end of the last assistant turn, those from message ``since`` on learned. Raises
    RowFault."""
    eos = end_of_sequence(tokenizer)
    try:
        segments = assistant_segments(tokenizer, messages, since)
    except TokenizerError as error:
        raise RowFault(str(error), "mend the messages or the template") from error
    pieces = [(tokenizer.encode(text), said) for text, said in segments]
    last = max(i for i, (_, said) in enumerate(pieces) if said)
    if eos not in pieces[last][0]:
        pieces[last] = ([*pieces[last][0], eos], True)
    return pieces[: last + 1]


def end_of_sequence(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"{tokenizer.folder} names no eos_token, without which a model cannot learn to stop")
    return tokenizer.eos_token_id


def pieces_fit(pieces: Pieces, data: DataConfig, max_len: int | None) -> bool:
    """False where the example is too long and to be dropped for it. Raises RowFault where it is not to be dropped."""
    length = sum(len(ids) for ids, _ in pieces)
    problem = length_problem(len(pieces[0][0]), data.rollout_max_prompt_len, None)
    if problem is None and max_len is not None and length > max_len:
        problem = f"the example has {length} tokens, more than {max_len}", "shorten it or raise the limit"
    if problem is not None and not data.drop_long_prompts:
        raise RowFault(*problem)
    return problem is None


def join_pieces(uid: str, pieces: Pieces) -> SftExample:
    return SftExample(
        uid,
        np.concatenate([np.asarray(ids, np.int32) for ids, _ in pieces]),
        np.concatenate([np.full(len(ids), said, np.float32) for ids, said in pieces]),
    )
