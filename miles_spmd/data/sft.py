"""Supervised examples: a prompt with its answer, or a conversation in which the assistant's turns are learned."""

from __future__ import annotations

import msgspec
import numpy as np

from miles_spmd.config.schema import Data
from miles_spmd.data.chat import assistant_segments
from miles_spmd.data.dataset import Fault, Row, parse_slice, read_rows
from miles_spmd.data.prompts import RowFault, length_problem, raise_faults, read_input, read_label
from miles_spmd.data.tokenizer import Tokenizer, TokenizerError


class SftExample(msgspec.Struct, frozen=True):
    """One sequence to learn; arrays of length T. ``loss_mask`` divided by the batch's sum of masks, or whatever the
    loss's denominator is, gives the ``loss_weights`` of a ``TrainSequence``."""

    uid: str
    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # float32, 1 on the assistant's tokens and the end of sequence


def load_sft_examples(data: Data, tokenizer: Tokenizer, *, max_len: int | None = None) -> list[SftExample]:
    """Every example of ``data.prompt_data``, tokenized, end of sequence appended. ``max_len`` is in tokens.

    Input messages that end with the assistant's are learned in all assistant turns; any other input is a prompt whose
    answer is the label column. Prompt and answer are tokenized apart, as they are when an engine generates the answer.

    Raises DataError with all faults of the file, as ``load_prompts`` does.
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"{tokenizer.folder} names no eos_token, without which a model cannot learn to stop")
    path, _ = parse_slice(data.prompt_data)
    faults: list[Fault] = []
    examples = []
    for number, row in read_rows(data.prompt_data, faults):
        try:
            pieces = _tokenized_pieces(row, data, tokenizer)
        except RowFault as fault:
            faults.append(Fault(number, *fault.fault))
            continue
        tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in pieces])
        mask = np.concatenate([np.full(len(ids), said, np.float32) for ids, said in pieces])
        problem = length_problem(len(pieces[0][0]), data.rollout_max_prompt_len, None)
        if problem is None and max_len is not None and len(tokens) > max_len:
            problem = f"the example has {len(tokens)} tokens, more than {max_len}", "shorten it or raise the limit"
        if problem is None:
            examples.append(SftExample(f"{path.name}:{number}", tokens, mask))
        elif not data.drop_long_prompts:
            faults.append(Fault(number, *problem))
    raise_faults(data.prompt_data, faults, len(examples))
    return examples


def _tokenized_pieces(row: Row, data: Data, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Token ids in order, each piece with whether it is learned. The first piece is the (first) prompt."""
    value = read_input(row, data)
    eos: list[int] = [tokenizer.eos_token_id]  # type: ignore[list-item]
    try:
        if isinstance(value, list) and value[-1]["role"] == "assistant":
            segments = assistant_segments(tokenizer, value)
            pieces = [(tokenizer.encode(text), said) for text, said in segments]
            last = max(i for i, (_, said) in enumerate(pieces) if said)
            if eos[0] not in pieces[last][0]:
                pieces[last:] = [(pieces[last][0] + eos, True)]
            return pieces[: last + 1]
        text = value if isinstance(value, str) else tokenizer.render(value)
    except TokenizerError as error:
        raise RowFault(str(error), "mend the messages or the template") from error
    answer = read_label(row, data.label_key, required=True)
    if not isinstance(answer, str) or not answer.strip():
        remedy = "give the answer as a string in data.label_key, or end the messages with the assistant's"
        raise RowFault(f"the answer {answer!r} is not a non-empty string", remedy)
    prompt = tokenizer.encode_prompts([text], [isinstance(value, list)])[0]
    return [(prompt, False), (tokenizer.encode(answer) + eos, True)]
