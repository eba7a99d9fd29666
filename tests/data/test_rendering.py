"""What the model sees, against transformers' own apply_chat_template, over the kinds of tokenizers there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from miles_spmd.config import DataConfig
from miles_spmd.data.dataset import DataError
from miles_spmd.data.examples import load_preference_pairs, load_sft_examples
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.tokenizer import Tokenizer
from tests.data.conftest import CHATML, write_tokenizer
from tests.data.kinds import KINDS, TEMPLATES, write_kind

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "  naß?"},
    {"role": "assistant", "content": "你好 world ß"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}]
# Writes every field of a message as the data has it.
FIELDS = (
    "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% for key, value in m | dictsort if key != 'role' %} {{ key }}={{ value | tojson }}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft(tmp_path: Path, tokenizer: Tokenizer, *rows: Any, **settings: Any) -> list[tuple[list[int], list[float]]]:
    examples = load_sft_examples(DataConfig(prompt_data=write(tmp_path / "a.jsonl", *rows), **settings), tokenizer)
    return [(example.tokens.tolist(), example.loss_mask.tolist()) for example in examples]


def text(tmp_path: Path, tokenizer: Tokenizer, row: Any, **settings: Any) -> str:
    return load_prompts(DataConfig(prompt_data=write(tmp_path / "a.jsonl", row), **settings), tokenizer)[0].text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_conversations_equal_transformers(tmp_path: Path, kind: str, template: str) -> None:
    """Tokens and mask of a marked template, and of the same template without marks."""
    folder = write_kind(tmp_path / "t", kind, template, marked=True)
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    for marked in (True, False):
        tokenizer = Tokenizer(write_kind(folder, kind, template, marked))
        ((tokens, mask),) = sft(tmp_path, tokenizer, {"prompt": TALK})
        assert tokens == expected["input_ids"][: len(tokens)]
        assert mask == expected["assistant_masks"][: len(tokens)]
        assert not any(expected["assistant_masks"][len(tokens) :])
        assert tokens[-1] == tokenizer.eos_token_id
        data = DataConfig(prompt_data=write(tmp_path / "rl.jsonl", {"prompt": TALK[:-1]}), label_key=None)
        (prompt,) = load_prompts(data, tokenizer)
        rendered = theirs.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=True)
        assert prompt.tokens == rendered["input_ids"]
        pair = {"chosen": TALK, "rejected": [*TALK[:-1], {"role": "assistant", "content": "no"}]}
        (both,) = load_preference_pairs(DataConfig(prompt_data=write(tmp_path / "p.jsonl", pair)), tokenizer)
        assert both.chosen.tokens.tolist() == tokens
        last = int(np.flatnonzero(np.diff(mask) == 1)[-1]) + 1  # of two assistant messages the second is trained
        assert both.chosen.loss_mask.tolist() == [0.0] * last + mask[last:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_continues_its_prompt(tmp_path: Path, kind: str) -> None:
    """One text, encoded once, where no token reaches over the end of the prompt; else the prompt is encoded as the
    engine gets it, and the response gets no blank of its own."""
    tokenizer = Tokenizer(write_kind(tmp_path / "t", kind, "tags", marked=False))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    for prompt, response in (("What is seven plus", " twelve?"), ("[INST] why [/INST]", "It is 19."), ("It", " is")):
        ((tokens, mask),) = sft(tmp_path, tokenizer, {"prompt": prompt, "label": response})
        assert tokens == [*theirs(prompt + response)["input_ids"], tokenizer.eos_token_id]
        start = len(theirs(prompt)["input_ids"])
        assert mask == [0.0] * start + [1.0] * (len(tokens) - start)
    for prompt, response in (("What is seven ", "twelve?"), ("It i", "s 19.")):
        ((tokens, mask),) = sft(tmp_path, tokenizer, {"prompt": prompt, "label": response})
        start = int(np.argmax(mask))
        assert tokens[:start] == theirs(prompt)["input_ids"]
        assert tokenizer.decode(tokens[:-1]).strip() == prompt + response


def test_all_fields_of_messages_reach_the_template(tmp_path: Path) -> None:
    """Null and missing fields stay what they are in JSONL; parquet cannot tell them apart, except for a content."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1 plus 3", "name": None},
        {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "x"},
        {"role": "assistant", "content": "four", "reasoning_content": None},
    ]
    folder = write_tokenizer(tmp_path / "t", FIELDS)
    tokenizer, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False)
    ((tokens, mask),) = sft(tmp_path, tokenizer, {"prompt": messages})
    assert tokenizer.decode(tokens, skip_special_tokens=False) == expected
    learned = tokenizer.decode(np.asarray(tokens)[np.asarray(mask) == 1].tolist(), skip_special_tokens=False)
    assert learned.startswith(' content=null reasoning_content="hm" tool_calls=[')
    assert text(tmp_path, tokenizer, {"prompt": messages[:3], "label": ""}) == theirs.apply_chat_template(
        messages[:3], tokenize=False, add_generation_prompt=True
    )
    without = [{"role": m["role"], "content": m["content"]} | {k: v for k, v in m.items() if v} for m in messages]
    without[1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": messages}]), path)
    (example,) = load_sft_examples(DataConfig(prompt_data=str(path)), tokenizer)
    found = tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False)
    assert found == theirs.apply_chat_template(without, tokenize=False)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_the_template(tmp_path: Path, as_text: bool) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", FIELDS))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    row = {"prompt": TALK[:2], "label": "x", "tools": json.dumps(TOOLS) if as_text else TOOLS}
    expected = theirs.apply_chat_template(TALK[:2], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert expected.startswith('TOOLS [{"type": "function"')
    assert text(tmp_path, tokenizer, row) == expected
    assert text(tmp_path, tokenizer, row, tool_key=None) == expected[expected.index("<|im_start|>") :]
    assert text(tmp_path, tokenizer, {**row, "mine": row.pop("tools")}, tool_key="mine") == expected
    whole = {"prompt": TALK[:3], "tools": TOOLS}
    pair = {"chosen": TALK[:3], "rejected": [*TALK[:2], {"role": "assistant", "content": "no"}], "tools": TOOLS}
    ((tokens, _),) = sft(tmp_path, tokenizer, whole)
    (both,) = load_preference_pairs(DataConfig(prompt_data=write(tmp_path / "p.jsonl", pair)), tokenizer)
    assert tokens == both.chosen.tokens.tolist()
    assert tokenizer.decode(tokens, skip_special_tokens=False).startswith("TOOLS [{")
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'tools' is not a list of objects; .*data\.tool_key"):
        text(tmp_path, tokenizer, {**whole, "prompt": TALK[:2], "label": "x", "tools": ["add"]})


def test_a_template_for_tools_is_chosen_as_transformers_does(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", "plain")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    for tokenizer in (Tokenizer(folder), _saved(folder, tmp_path / "new")):
        assert text(tmp_path, tokenizer, {"prompt": TALK[:2], "label": 1}) == "plain"
        assert text(tmp_path, tokenizer, {"prompt": TALK[:2], "label": 1, "tools": TOOLS}) == "with tools"


def _saved(folder: Path, to: Path) -> Tokenizer:
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    assert (to / "additional_chat_templates").is_dir()
    return Tokenizer(to)


def test_variables_of_the_template_and_system_prompt(tmp_path: Path) -> None:
    template = "{{ effort | default('none') }} {{ enable_thinking | default('unset') }}|" + CHATML
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", template))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    row = {"prompt": TALK[1:2], "label": 1}
    ours = {"enable_thinking": False}
    expected = theirs.apply_chat_template(TALK[1:2], tokenize=False, add_generation_prompt=True, **ours)
    assert text(tmp_path, tokenizer, row, chat_template_kwargs=ours) == expected
    own = {**row, "chat_template_kwargs": {"effort": "high", "enable_thinking": None}}
    assert text(tmp_path, tokenizer, own, chat_template_kwargs=ours).startswith("high False|")
    assert text(tmp_path, tokenizer, {**row, "chat_template_kwargs": '{"effort": 2}'}).startswith("2 unset|")
    for wrong, message in (
        ({"messages": []}, "messages cannot be given"),
        ([1], "list instead of"),
        ("{", "is not JSON"),
    ):
        with pytest.raises(DataError, match=rf"'chat_template_kwargs'.*{message}"):
            text(tmp_path, tokenizer, {**row, "chat_template_kwargs": wrong})
    with pytest.raises(ValueError, match=r"must be without add_generation_prompt, .*messages"):
        DataConfig(prompt_data="x", chat_template_kwargs={"tools": []})

    system = "<|im_start|>system\nbe kind<|im_end|>\n"
    assert f"|{system}<|im_start|>user" in text(tmp_path, tokenizer, row, system_prompt="be kind")
    plain = {"prompt": "hi", "label": "ho"}
    assert system in text(tmp_path, tokenizer, plain, system_prompt="be kind", apply_chat_template=True)
    assert "be kind" not in text(tmp_path, tokenizer, {"prompt": TALK[:2], "label": 1}, system_prompt="be kind")
    ((tokens, _),) = sft(tmp_path, tokenizer, {"prompt": TALK[1:3]}, system_prompt="be kind")
    assert system in tokenizer.decode(tokens, skip_special_tokens=False)
    with pytest.raises(DataError, match=r"data\.system_prompt; set data\.apply_chat_template") as caught:
        sft(tmp_path, tokenizer, plain, plain, plain, system_prompt="be kind")
    assert len(caught.value.errors) == 1


def test_the_clock_of_a_template_is_a_setting(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", "{{ strftime_now('%d %b %Y %H:%M') }}"))
    row = {"prompt": TALK[:2], "label": 1}
    assert text(tmp_path, tokenizer, row) == "01 Jan 2026 00:00"
    assert text(tmp_path, tokenizer, row, chat_template_date="2024-07-26") == "26 Jul 2024 00:00"
    assert tokenizer.render(TALK) == "01 Jan 2026 00:00"
    with pytest.raises(ValueError, match="must be a date such as 2026-01-31, got 'today'"):
        DataConfig(prompt_data="x", chat_template_date="today")


def test_contents_in_parts(tmp_path: Path) -> None:
    """A template that reads parts gets them; one that writes a content as it is gets their text."""
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "label": 1}
    plain = Tokenizer(write_tokenizer(tmp_path / "t", CHATML))
    joined = "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert text(tmp_path, plain, row) == joined
    reading = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    folder = write_tokenizer(tmp_path / "p", reading)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert text(tmp_path, Tokenizer(folder), row) == theirs.apply_chat_template(row["prompt"], tokenize=False)
    image = {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "label": 1}
    with pytest.raises(DataError, match=r"message 0 \(user\) has a content part of type 'image'; only text"):
        text(tmp_path, plain, image)


def test_a_template_that_is_missing_or_broken_is_one_error(tmp_path: Path) -> None:
    for template, message in ((None, "has no chat template"), ("{% if %}", "is not valid in line 1")):
        tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", template))
        rows = [{"prompt": TALK[:2], "label": "x"}] * 30
        for load in (load_prompts, load_sft_examples):
            with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{message}") as caught:
                load(DataConfig(prompt_data=write(tmp_path / "a.jsonl", *rows)), tokenizer)
            assert len(caught.value.errors) == 1


def test_a_template_may_raise_anything(tmp_path: Path) -> None:
    endless = "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}"
    for template in (endless, "{{ messages[7].content }}", "{{ 1 // 0 }}"):
        tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", template))
        with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template rejects"):
            text(tmp_path, tokenizer, {"prompt": TALK[:2], "label": 1})


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_in_which_a_tool_spells_special_tokens(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer(write_kind(tmp_path / "t", kind, "tags", marked=False))
    start, end = (tokenizer.encode(token)[-1] for token in ("<|user|>", "</s>"))
    before, result, behind = "user: ", "It is </s><|user|> and?", "</s>\n<|user|>"
    spans = [(len(before), len(before + result))]
    tokens = tokenizer.encode_continuation(before + result + behind, spans)
    assert [token for token in tokens if token in (start, end)] == [end, start]
    as_it_is = tokenizer.encode_continuation(before + result + behind)
    assert [token for token in as_it_is if token in (start, end)] == [end, start, end, start]
    harmless = before + "It is" + behind
    assert tokenizer.encode_continuation(harmless, [(6, 11)]) == tokenizer.encode_continuation(harmless)
    if kind != "unigram":  # which writes no line break, and others' blanks
        whole = tokenizer.decode(tokenizer.encode("why") + tokens, skip_special_tokens=False)
        assert whole.replace(" ", "") == ("why" + before + result + behind).replace(" ", "")


def test_metadata_has_the_conversation_and_the_templates_variables(tmp_path: Path) -> None:
    """From which an environment renders it again, with tools."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "t", CHATML))
    rows = ({"prompt": TALK[1:2], "chat_template_kwargs": {"b": 2}}, {"prompt": TALK[1:2]}, {"prompt": "plain"})
    path = write(tmp_path / "a.jsonl", *rows)
    data = DataConfig(prompt_data=path, input_key="prompt", label_key="", chat_template_kwargs={"a": 1})
    found = [prompt.metadata for prompt in load_prompts(data, tokenizer)]
    assert [each.get("chat_template_kwargs") for each in found] == [{"a": 1, "b": 2}, {"a": 1}, None]
    assert [each.get("messages") for each in found] == [TALK[1:2], TALK[1:2], None]
