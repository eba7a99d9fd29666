from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles_spmd.config import DataConfig
from miles_spmd.data.dataset import DataError, parse_slice
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.tokenizer import Tokenizer
from tests.data.conftest import write_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 1+1?", "label": 2, "metadata": {"level": "easy"}, "source": "book"},
    {"prompt": [{"role": "user", "content": "What is 2+2?"}], "label": "4"},
    {"prompt": "What is 10**30?", "label": 10**30},
]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_rows_become_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    plain, chat, big = load_prompts(DataConfig(prompt_data=path), tokenizer)
    assert (plain.uid, plain.text, plain.label) == ("train.jsonl:1", "What is 1+1?", 2)
    assert plain.tokens == tokenizer.encode("What is 1+1?")
    assert plain.metadata == {"level": "easy", "source": "book", "label": 2}
    assert chat.text == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.metadata["messages"] == ROWS[1]["prompt"]
    assert big.label == 10**30
    wrapped = load_prompts(DataConfig(prompt_data=path, apply_chat_template=True), tokenizer, name="eval")[0]
    assert wrapped.uid == "eval:1"
    assert wrapped.text == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"


def test_parquet_equals_jsonl(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Also where parquet gives every message the fields of all."""
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": f"What is {i}+1?"}], "extra": {"answer": str(i + 1)}} for i in range(5)
    ]
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    rows[0]["prompt"][0]["name"] = None
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=2)
    for cut in ("", "@[1:3]", "@[-2:]"):
        both = [
            load_prompts(DataConfig(prompt_data=f"{p}{cut}", label_key="extra.answer"), tokenizer, name="x")
            for p in (table, lines)
        ]
        assert both[0] == both[1]
    assert [(p.uid, p.label) for p in both[0]] == [("x:4", "4"), ("x:5", "5")]


@pytest.mark.parametrize("text", ["[0:2]", "[1:]", "[:-1]", "[:]", "[2:99]"])
def test_slices_mean_what_python_means(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"q{i}", "label": i} for i in range(4)])
    labels = [p.label for p in load_prompts(DataConfig(prompt_data=f"{path}@{text}"), tokenizer)]
    assert labels == eval(f"[0, 1, 2, 3]{text}")


def test_malformed_slice() -> None:
    for wrong in ("a.jsonl@[1]", "a.jsonl@[a:b]", "a.jsonl@[1:2:3]"):
        with pytest.raises(DataError, match="malformed slice"):
            parse_slice(wrong)
    assert parse_slice("dir@home/a.jsonl")[0] == Path("dir@home/a.jsonl")


def test_every_error_of_a_file_is_reported_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"prompt": "fine", "label": 1})
    lines = [
        good,
        '{"prompt": "cut',
        "",
        "[1, 2]",
        json.dumps({"question": "?", "label": 1}),
        json.dumps({"prompt": 7, "label": 1}),
        json.dumps({"prompt": "   ", "label": 1}),
        json.dumps({"prompt": [], "label": 1}),
        json.dumps({"prompt": [{"role": "user"}], "label": 1}),
        json.dumps({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": 1}),
        json.dumps({"prompt": "no label"}),
        json.dumps({"prompt": "x", "label": 1, "metadata": "text"}),
        json.dumps({"prompt": "long " * 50, "label": 1}),
    ]
    path.write_bytes(("\n".join(lines) + "\n").encode() + b'{"prompt": "\xff"}\n' + good.encode())
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(prompt_data=str(path), rollout_max_prompt_len=40), tokenizer)
    expected = {
        2: "invalid JSON",
        4: "list instead of an object",
        5: "missing key 'prompt' (the row has: question, label)",
        6: "'prompt' (int)",
        7: "'prompt' is empty",
        8: "non-empty list",
        9: "message 0 (user) has no string 'content'",
        10: "the last message is the assistant's",
        11: "missing key 'label'",
        12: "'metadata' is str",
        13: "tokens, more than data.rollout_max_prompt_len = 40",
        14: "invalid JSON",
    }
    assert [e.row for e in caught.value.errors] == list(expected)
    for error, text in zip(caught.value.errors, expected.values()):
        assert text in error.problem
        assert error.remedy
        assert f"{path}:{error.row}: {error.problem}; {error.remedy}" in str(caught.value)


def test_long_prompts(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hi", "label": 1}, {"prompt": "long " * 50, "label": 1}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*of which 30 fit into the context"):
        load_prompts(DataConfig(prompt_data=path), tokenizer, room=30)
    kept = load_prompts(DataConfig(prompt_data=path, drop_long_prompts=True), tokenizer, room=30)
    assert [p.uid for p in kept] == ["a.jsonl:1"]
    assert "dropped 1 of 2" in caplog.text
    with pytest.raises(DataError, match="no rows"):
        load_prompts(DataConfig(prompt_data=path, drop_long_prompts=True, rollout_max_prompt_len=1), tokenizer)


def test_many_errors_are_counted_not_printed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{}] * 50)
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(prompt_data=path), tokenizer)
    assert len(caught.value.errors) == 50
    assert str(caught.value).endswith(f"... and 30 more errors in {path}")


def test_whole_files_that_cannot_be_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "a.csv").write_text("prompt,label\n")
    wrongs = {"empty.jsonl": "no rows", "broken.parquet": "unreadable", "a.csv": "unknown kind", "b.jsonl": "no such"}
    for name, message in wrongs.items():
        with pytest.raises(DataError, match=message):
            load_prompts(DataConfig(prompt_data=str(tmp_path / name)), tokenizer)


def test_chat_prompts_without_a_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*has no chat template"):
        load_prompts(DataConfig(prompt_data=path), Tokenizer(write_tokenizer(tmp_path / "t", chat_template=None)))


def test_a_label_can_be_waived(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hi"}])
    assert load_prompts(DataConfig(prompt_data=path, label_key=""), tokenizer)[0].label is None
