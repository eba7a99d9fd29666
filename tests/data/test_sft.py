from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from miles_spmd.config import DataConfig
from miles_spmd.data.dataset import DataError
from miles_spmd.data.examples import SftExample, load_sft_examples
from miles_spmd.data.tokenizer import Tokenizer, TokenizerError
from tests.data.conftest import CHATML, write_tokenizer

TALK = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "and 2+2?"},
    {"role": "assistant", "content": "It is 4."},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(tmp_path: Path, tokenizer: Tokenizer, *rows: Any, **settings: Any) -> list[SftExample]:
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    max_len = settings.pop("max_len", None)
    return load_sft_examples(DataConfig(prompt_data=str(path), **settings), tokenizer, max_len=max_len)


def learned(example: SftExample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.tokens[example.loss_mask == 1].tolist(), skip_special_tokens=False)


def test_prompt_and_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": "seven plus twelve", "label": " It is 19."}
    plain = load(tmp_path, tokenizer, row)[0]
    assert plain.tokens.dtype == np.int32
    assert plain.loss_mask.dtype == np.float32
    assert plain.uid == "sft.jsonl:1"
    assert tokenizer.decode(plain.tokens.tolist(), False) == "seven plus twelve It is 19.<|im_end|>"
    assert learned(plain, tokenizer) == " It is 19.<|im_end|>"
    assert plain.tokens[-1] == tokenizer.eos_token_id
    chat = load(tmp_path, tokenizer, row, apply_chat_template=True)[0]
    assert tokenizer.decode(chat.tokens.tolist(), False) == (
        "<|im_start|>user\nseven plus twelve<|im_end|>\n<|im_start|>assistant\n It is 19.<|im_end|>"
    )
    assert learned(chat, tokenizer) == " It is 19.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_what_the_assistant_says_is_learned(tmp_path: Path, template: str) -> None:
    """Both ways to find the assistant's text against transformers' assistant mask."""
    folder = write_tokenizer(tmp_path / "marked", MARKED)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "own", template))
    example = load(tmp_path, tokenizer, {"prompt": TALK})[0]
    count = len(example.tokens)
    assert example.tokens.tolist() == theirs["input_ids"][:count]
    assert example.loss_mask.tolist() == theirs["assistant_masks"][:count]
    assert tokenizer.decode(theirs["input_ids"][count:], False) == "\n"  # nothing to learn after the last answer
    assert learned(example, tokenizer) == "It is 2.<|im_end|>It is 4.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_message_with_weight_0_is_not_learned(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "own", template))
    whole = load(tmp_path, tokenizer, {"prompt": TALK})[0]
    first, second = ([{**m, "weight": int(i == turn)} for i, m in enumerate(TALK)] for turn in (1, 3))
    later = load(tmp_path, tokenizer, {"prompt": second})[0]
    assert later.tokens.tolist() == whole.tokens.tolist()
    assert learned(later, tokenizer) == "It is 4.<|im_end|>"
    earlier = load(tmp_path, tokenizer, {"prompt": first})[0]  # what follows the last learned turn has no use
    assert earlier.tokens.tolist() == whole.tokens[: len(earlier.tokens)].tolist()
    assert learned(earlier, tokenizer) == "It is 2.<|im_end|>"
    null = load(tmp_path, tokenizer, {"prompt": [{**m, "weight": None} for m in TALK]})[0]
    assert null.loss_mask.tolist() == whole.loss_mask.tolist()
    for weight, problem in (
        (0, "has the weight 0, so that nothing is trained"),
        (0.5, "has the weight 0.5; it can be"),
    ):
        with pytest.raises(DataError, match=problem):
            load(tmp_path, tokenizer, {"prompt": [{**m, "weight": weight} for m in TALK]})


def test_a_template_without_eos_gets_one(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", template))
    example = load(tmp_path, tokenizer, {"prompt": TALK[:2]})[0]
    assert learned(example, tokenizer) == "It is 2.\n<|im_end|>"


def test_a_template_that_rewrites_history_is_named(tmp_path: Path) -> None:
    """Reasoning templates drop the thoughts of earlier turns, so the learned text would not be what was generated."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content[:2] }}{% endfor %}"
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", template))
    with pytest.raises(DataError, match=r"sft\.jsonl:1: .*\{% generation %\}"):
        load(tmp_path, tokenizer, {"prompt": TALK})


def test_errors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "no answer"},
        {"prompt": "a number", "label": 19},
        {"prompt": "empty", "label": " "},
        {"prompt": TALK[:3]},
        {"prompt": "too long", "label": "x" * 100},
        {"prompt": "fine", "label": "yes"},
    ]
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer, *rows, max_len=30)
    assert [e.row for e in caught.value.errors] == [1, 2, 3, 4, 5]
    assert "tokens, more than 30" in caught.value.errors[-1].problem
    assert [e.uid for e in load(tmp_path, tokenizer, *rows[4:], max_len=30, drop_long_prompts=True)] == ["sft.jsonl:2"]


def test_no_end_of_sequence_token(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token"', '"other"'))
    with pytest.raises(TokenizerError, match="eos_token"):
        load(tmp_path, Tokenizer(folder), {"prompt": "a", "label": "b"})
