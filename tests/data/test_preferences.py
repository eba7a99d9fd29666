from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from miles_spmd.config import DataConfig
from miles_spmd.data.dataset import DataError
from miles_spmd.data.examples import PreferencePair, SftExample, load_preference_pairs, load_sft_examples
from miles_spmd.data.source import PromptSource
from miles_spmd.data.tokenizer import Tokenizer
from tests.data.conftest import CHATML, write_tokenizer
from tests.data.test_sft import MARKED

Message = dict[str, str]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


TALK = [user("What is 1+1?"), assistant("It is 2."), user("and 2+2?")]


def load(tmp_path: Path, tokenizer: Tokenizer, *rows: Any, **settings: Any) -> list[PreferencePair]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = {key: settings.pop(key) for key in ("name", "max_len", "scores_end") if key in settings}
    return load_preference_pairs(DataConfig(prompt_data=str(path), **settings), tokenizer, **own)


def same(a: SftExample, b: SftExample) -> bool:
    return a.tokens.tolist() == b.tokens.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()


def text(example: SftExample, tokenizer: Tokenizer, trained: float) -> str:
    return tokenizer.decode(example.tokens[example.loss_mask == trained].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("templated", [False, True])
def test_each_answer_is_tokenized_as_supervised_learning_does(
    tmp_path: Path, tokenizer: Tokenizer, templated: bool
) -> None:
    rows = [{"prompt": p, "chosen": " It is 19.", "rejected": " 9"} for p in ("seven plus twelve", "12 plus 7")]
    pairs = load(tmp_path, tokenizer, *rows, apply_chat_template=templated)
    for key in ("chosen", "rejected"):
        data = DataConfig(prompt_data=str(tmp_path / "pairs.jsonl"), label_key=key, apply_chat_template=templated)
        for pair, example in zip(pairs, load_sft_examples(data, tokenizer), strict=True):
            assert same(getattr(pair, key), example)
            assert (pair.uid, example.uid) == (example.uid, getattr(pair, key).uid)
    assert [p.uid for p in load(tmp_path, tokenizer, *rows, name="heldout")] == ["heldout:1", "heldout:2"]
    assert pairs[0].chosen.tokens.dtype == np.int32
    assert pairs[0].chosen.loss_mask.dtype == np.float32
    assert text(pairs[0].rejected, tokenizer, 1) == " 9<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_all_forms_of_a_row_are_the_same_pair(tmp_path: Path, template: str) -> None:
    """Earlier answers in the prompt, which a template may mark as the assistant's, are not trained."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", template))
    right, wrong = assistant("It is 4."), assistant("It is 5.")
    forms = [
        {"prompt": TALK, "chosen": "It is 4.", "rejected": "It is 5."},
        {"prompt": TALK, "chosen": [right], "rejected": [wrong]},
        {"prompt": TALK, "chosen": [right], "rejected": "It is 5."},
        {"chosen": [*TALK, right], "rejected": [*TALK, wrong]},
        {"prompt": "and 2+2?", "chosen": [*TALK, right], "rejected": [*TALK, wrong]},
    ]
    pairs = load(tmp_path, tokenizer, *forms)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    prompt = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]
    for key, said in (("chosen", "It is 4.<|im_end|>"), ("rejected", "It is 5.<|im_end|>")):
        answer = theirs(said, add_special_tokens=False)["input_ids"]
        for pair in pairs:
            assert getattr(pair, key).tokens.tolist() == prompt + answer
            assert getattr(pair, key).loss_mask.tolist() == [0] * len(prompt) + [1] * len(answer)


def test_a_plain_prompt_with_messages_is_one_users_message(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": "hi", "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    pair = load(tmp_path, tokenizer, row)[0]
    assert text(pair.chosen, tokenizer, 0) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_answers_of_several_turns(tmp_path: Path) -> None:
    """The assistant's turns are trained, what it is told between them is not; one answer may be the other's start."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", MARKED))
    asks = [*TALK, assistant("Do you mean 4?"), user("yes"), assistant("It is 4.")]
    pair = load(tmp_path, tokenizer, {"chosen": asks, "rejected": asks[:-2]})[0]
    assert text(pair.chosen, tokenizer, 1) == "Do you mean 4?<|im_end|>It is 4.<|im_end|>"
    assert text(pair.rejected, tokenizer, 1) == "Do you mean 4?<|im_end|>"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t").apply_chat_template(
        asks, return_dict=True, return_assistant_tokens_mask=True
    )
    count = len(pair.chosen.tokens)
    start = len(pair.rejected.tokens) - int(pair.rejected.loss_mask.sum())
    assert pair.chosen.tokens.tolist() == theirs["input_ids"][:count]
    assert pair.chosen.loss_mask[start:].tolist() == theirs["assistant_masks"][start:count]
    assert not pair.chosen.loss_mask[:start].any()


def test_a_score_is_read_at_the_end_of_sequence(tmp_path: Path) -> None:
    """Also where the template counts the line feed behind it as the assistant's."""
    rows = [
        {"prompt": "seven", "chosen": "7", "rejected": "8"},
        {"prompt": TALK, "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ]
    longer = MARKED.replace("<|im_end|>{% endgeneration %}{% else %}", "<|im_end|>\n{% endgeneration %}{% else %}")
    for template in (CHATML, longer):
        tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", template))
        eos = tokenizer.eos_token_id
        plain = load(tmp_path, tokenizer, *rows)
        for pair, scored in zip(plain, load(tmp_path, tokenizer, *rows, scores_end=True), strict=True):
            for was, now in ((pair.chosen, scored.chosen), (pair.rejected, scored.rejected)):
                assert now.tokens[-2:].tolist() == [eos, eos]
                assert now.loss_mask.tolist() == [0] * (len(now.tokens) - 1) + [1]
                assert now.tokens[:-1].tolist() == was.tokens[: len(now.tokens) - 1].tolist()
                assert eos not in was.tokens[len(now.tokens) - 1 :]
    assert plain[1].chosen.tokens[-1] != eos  # the second template is the case it is meant to be


def test_errors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = [*TALK, assistant("4")]
    faulty: list[tuple[str, dict[str, Any]]] = [
        (r"missing key 'chosen' .*data\.chosen_key", {"prompt": "a", "rejected": "b"}),
        (r"missing key 'rejected' .*data\.rejected_key", {"prompt": "a", "chosen": "b"}),
        (r"missing key 'prompt' .*data\.input_key", {"chosen": "a", "rejected": "b"}),
        (r"'rejected' is empty", {"prompt": "a", "chosen": "b", "rejected": " \n"}),
        (r"'chosen' \(int\)", {"prompt": "a", "chosen": 3, "rejected": "4"}),
        (r"'chosen' has an empty assistant", {"prompt": "a", "chosen": [assistant(" ")], "rejected": "4"}),
        (r"'chosen' and 'rejected' are the same", {"prompt": "a", "chosen": "b", "rejected": "b"}),
        (r"are the same", {"chosen": whole, "rejected": whole}),
        (r"are the same", {"prompt": TALK, "chosen": "4", "rejected": [assistant("4")]}),
        (
            r"without a common beginning",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        ),
        (r"without a common beginning; begin both", {"prompt": "a", "chosen": [assistant("b")], "rejected": whole}),
        (r"'rejected' does not end with", {"chosen": whole, "rejected": TALK}),
        (r"begins with a message of 'user'", {"prompt": [user("a")], "chosen": whole, "rejected": "5"}),
        (r"prompt ends with one of 'assistant'", {"prompt": whole, "chosen": [assistant("b")], "rejected": "c"}),
        (r"the last message is the assistant's", {"prompt": whole, "chosen": "b", "rejected": "c"}),
        (r"is a string and the other one messages", {"prompt": "a", "chosen": [assistant("b")], "rejected": "c"}),
        (r"has 104 tokens, more than 60", {"prompt": "a", "chosen": "b", "rejected": "x" * 102}),
    ]
    fine = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [row for _, row in faulty]
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer, *rows, fine, max_len=60)
    for number, ((problem, _), error) in enumerate(zip(faulty, caught.value.errors, strict=True), 1):
        assert error.row == number
        assert re.search(problem, str(error)), error
    assert [p.uid for p in load(tmp_path, tokenizer, rows[-1], fine, max_len=60, drop_long_prompts=True)] == [
        "pairs.jsonl:2"
    ]


def test_length_counts_the_scored_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "cc"}
    assert load(tmp_path, tokenizer, row, max_len=4)
    with pytest.raises(DataError, match="has 5 tokens, more than 4"):
        load(tmp_path, tokenizer, row, max_len=4, scores_end=True)


def test_pairs_repeat_as_prompts_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "b", "rejected": "c"}]
    pairs = PromptSource(load(tmp_path, tokenizer, *rows), seed=1).of_step(0, 4)
    assert sorted(p.uid for p in pairs) == [f"pairs.jsonl:{uid}" for uid in ("1", "1#2", "2", "2#2")]
