"""Pairs of a preferred and a rejected answer to the same prompt."""

from __future__ import annotations

from itertools import takewhile

import msgspec

from miles_spmd.config import DataConfig
from miles_spmd.data.dataset import Row
from miles_spmd.data.prompts import RowFault, read_input, read_text
from miles_spmd.data.sft import (
    Pieces,
    SftExample,
    answer_pieces,
    conversation_pieces,
    end_of_sequence,
    join_pieces,
    load_items,
    pieces_fit,
)
from miles_spmd.data.tokenizer import Message, Tokenizer

Turns = str | list[Message]  # an answer as text, or as the messages that continue the prompt's


class PreferencePair(msgspec.Struct, frozen=True):
    """Two sequences with the same prompt, whose mask is 0."""

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
    """Every pair of ``prompt_data`` (default: ``data.prompt_data``), tokenized as supervised examples are.

    The columns ``data.chosen_key`` and ``data.rejected_key`` hold a string, or the messages that continue the input's,
    the first and last of which are the assistant's. Messages that begin with anybody else's are whole conversations:
    the turns that both share are the prompt, and the input column is not read. A uid is ``name:row`` (default name: the
    file's); ``max_len`` is in tokens of one sequence.

    With ``scores_end``, as a reward model is trained, each sequence has one token more, the end of sequence a second
    time, and the mask is 1 on it alone: the trainer computes token t from the hidden state at t - 1, so that this
    is where the head reads the state at the end of sequence.

    Raises DataError with all faults of the file: missing columns, empty or equal answers, conversations that share no
    beginning, sequences that are too long unless ``data.drop_long_prompts``.
    """

    def pair(uid: str, row: Row) -> PreferencePair | None:
        prompt, *answers = _read_row(row, data)
        sequences = [_pieces(prompt, answer, tokenizer) for answer in answers]
        if sequences[0] == sequences[1]:
            raise RowFault(f"{data.chosen_key!r} and {data.rejected_key!r} are the same", "remove the row")
        if scores_end:
            sequences = [_scored_at_end(pieces, end_of_sequence(tokenizer)) for pieces in sequences]
        fitting = [pieces_fit(pieces, data, max_len) for pieces in sequences]
        return PreferencePair(uid, *(join_pieces(uid, pieces) for pieces in sequences)) if all(fitting) else None

    return load_items(prompt_data or data.prompt_data, name, pair)


def _read_row(row: Row, data: DataConfig) -> tuple[Turns, Turns, Turns]:
    """Prompt, preferred answer, rejected answer."""
    chosen = _read_answer(row, data.chosen_key, "data.chosen_key")
    rejected = _read_answer(row, data.rejected_key, "data.rejected_key")
    if isinstance(chosen, str) or isinstance(rejected, str) or chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return read_input(row, data), chosen, rejected
    # the last message is an answer even where the other conversation goes on from it
    same = [a == b for a, b in zip(chosen[:-1], rejected[:-1])]
    shared = len(list(takewhile(bool, same)))
    if not shared:
        problem = f"{data.chosen_key!r} and {data.rejected_key!r} are conversations that do not begin alike"
        raise RowFault(problem, "begin both with the prompt, or both with the assistant's answer to the input column")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _read_answer(row: Row, key: str, setting: str) -> Turns:
    answer = read_text(row, key, setting)
    if not isinstance(answer, str):
        for message in answer:
            said = message.get("content", "").strip() or message.get("tool_calls")
            if message["role"] == "assistant" and not said:
                raise RowFault(f"{key!r} has an empty assistant message", "fill it in or remove the row")
        if answer[-1]["role"] != "assistant":
            raise RowFault(f"{key!r} does not end with the assistant's message", "remove what follows it")
    return answer


def _pieces(prompt: Turns, answer: Turns, tokenizer: Tokenizer) -> Pieces:
    if isinstance(answer, str):
        return answer_pieces(prompt, answer, tokenizer)
    history = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    before, after = history[-1]["role"], answer[0]["role"]
    if before == "assistant" or after != "assistant":
        problem = f"the answer begins with the message of {after!r}, the prompt ends with that of {before!r}"
        raise RowFault(problem, "let the prompt end before the assistant's message, and the answer begin with it")
    return conversation_pieces(history + answer, len(history), tokenizer)


def _scored_at_end(pieces: Pieces, eos: int) -> Pieces:
    tokens = [token for ids, _ in pieces for token in ids]
    while tokens[-1] != eos:  # a template may mark a line feed behind it as the assistant's
        tokens.pop()
    return [(tokens, False), ([eos], True)]
