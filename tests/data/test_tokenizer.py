"""Our torch-free tokenizer and chat rendering against transformers' AutoTokenizer on the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from miles_spmd.config import DataConfig
from miles_spmd.data.examples import load_sft_examples
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.tokenizer import Tokenizer, TokenizerError
from tests.data.conftest import CHATML, write_tokenizer

TEXTS = ["seven plus 12 =", "  spaces\n\nlines ", "naß 你好", "", "<|im_start|>user\nhi<|im_end|>\n"]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2+2?"},
]


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_and_text_equal_transformers(tmp_path: Path, bos: bool) -> None:
    folder = write_tokenizer(tmp_path, bos=bos)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    assert ours.encode_prompts(TEXTS, [False] * len(TEXTS)) == expected
    assert (expected[0][0] == theirs.convert_tokens_to_ids("<s>")) == bos  # the case with BOS is one
    for text, ids in zip(TEXTS, expected):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


def test_no_end_of_sequence_between_prompt_and_response(tmp_path: Path) -> None:
    """A tokenizer may put one behind every text: a prompt would end with it, and an example have two, of which only the
    second one, that no model can reach, is trained."""
    folder = write_tokenizer(tmp_path)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(token, fast.token_to_id(token)) for token in ("<s>", "<|im_end|>")]
    fast.post_processor = processors.TemplateProcessing("<s> $A <|im_end|>", None, special)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "rows.jsonl").write_text('{"prompt": "What is", "label": " seven"}\n')
    tokenizer, data = Tokenizer(folder), DataConfig(prompt_data=str(folder / "rows.jsonl"))
    (prompt,), (example,) = load_prompts(data, tokenizer), load_sft_examples(data, tokenizer)
    assert tokenizer.decode(prompt.tokens, False) == "<s>What is"
    assert tokenizer.decode(example.tokens, False) == "<s>What is seven<|im_end|>"
    assert example.tokens[example.loss_mask == 0].tolist() == prompt.tokens


def test_text_that_starts_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, bos=True))
    assert tokenizer.encode_prompts(["<s>seven", "seven"], [False, False])[0] == tokenizer.encode("<s>seven")
    assert tokenizer.encode_prompts(["seven"], [True])[0] == tokenizer.encode("seven")


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("where", ["tokenizer_config", "jinja file", "named list"])
def test_chat_template_equals_transformers(tmp_path: Path, generate: bool, where: str) -> None:
    folder = write_tokenizer(tmp_path, chat_template=CHATML if where == "tokenizer_config" else None)
    if where == "jinja file":
        (folder / "chat_template.jinja").write_text(CHATML)
    elif where == "named list":
        path = folder / "tokenizer_config.json"
        named = '"chat_template": [{"name": "default", "template": %s}, {"name": "tool_use", "template": "x"}]'
        path.write_text(path.read_text()[:-1] + ", " + named % json.dumps(CHATML) + "}")
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = ours.render(TALK, add_generation_prompt=generate)
    assert text == theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generate)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>")
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=generate, return_dict=True)["input_ids"]
    assert ours.encode_prompts([text], [True]) == [ids]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path)
    folder = write_tokenizer(tmp_path / "other", chat_template=None)
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer(folder).render(TALK)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|im_end|>", "<|gone|>"))
    with pytest.raises(TokenizerError, match=r"eos_token '<\|gone\|>'"):
        Tokenizer(folder)


def test_a_template_that_refuses_says_why(tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}ok"
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(TokenizerError, match="start with the user"):
        tokenizer.render(TALK)


def test_the_data_room_needs_no_torch(chat_folder: Path) -> None:
    code = (
        "import sys\n"
        "from miles_spmd.data import chat, examples, prompts, source\n"
        "from miles_spmd.data.tokenizer import Tokenizer\n"
        f"t = Tokenizer({str(chat_folder)!r})\n"
        "print(t.render([{'role': 'user', 'content': 'hi'}]))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "<|im_start|>user" in done.stdout
