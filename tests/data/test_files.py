"""Data files as people have them: byte-order marks, other spellings of names, lists, text that is no JSON."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from miles_spmd.config import DataConfig
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.data.dataset import DataError
from miles_spmd.data.examples import load_preference_pairs, load_sft_examples
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.tokenizer import Tokenizer
from tests.data.conftest import write_tokenizer

ROWS = [
    {"prompt": f"What is {i}+1?", "label": "x", "chosen": "yes", "rejected": "no", "unused": "naß 你好"}
    for i in range(3)
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def uids(path: Path | str, tokenizer: Tokenizer, **settings: Any) -> list[str]:
    """Rows as all three readers find them."""
    data = DataConfig(prompt_data=str(path), **settings)
    loads: list[Any] = [load_prompts, load_sft_examples, load_preference_pairs]
    found = [[item.uid for item in load(data, tokenizer)] for load in loads]
    assert found[0] == found[1] == found[2]
    return found[0]


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("bom.jsonl", codecs.BOM_UTF8 + JSONL, 1),
        ("windows.jsonl", JSONL.replace(b"\n", b"\r\n"), 1),
        ("BIG.JSONL", b"\n" + JSONL, 2),
        ("a.Ndjson", JSONL.rstrip(), 1),
        ("list.json", codecs.BOM_UTF8 + json.dumps(ROWS, indent=1).encode(), 1),
        ("lines.json", JSONL, 1),
    ],
)
def test_rows_are_found(tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, first: int) -> None:
    (tmp_path / name).write_bytes(content)
    assert uids(tmp_path / name, tokenizer) == [f"{name}:{row}" for row in range(first, first + 3)]
    assert uids(f"{tmp_path / name}@[1:]", tokenizer) == [f"{name}:{row}" for row in range(first + 1, first + 3)]


def test_home_is_written_as_in_a_shell(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, recipe: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    assert len(uids("~/a.jsonl", tokenizer)) == 3
    assert len(uids("~/a.jsonl@[:2]", tokenizer)) == 2
    config = load_config(recipe, ["data.prompt_data=~/a.jsonl", "model.hf_checkpoint=~/model", "output_dir=~nobody/x"])
    assert (config.data.prompt_data, config.model.hf_checkpoint) == ("~/a.jsonl", tmp_path / "model")
    assert config.run.output_dir.name == "x"  # whose home is not known stays as it is
    with pytest.raises(ConfigError, match=r"data\.prompt_data: no file ~/b\.jsonl"):
        load_config(recipe, ["data.prompt_data=~/b.jsonl", "eval.eval_prompt_data={a='~/a.jsonl@[:1]'}"])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    tables = {
        "run": 'name = "a"',
        "model": f'hf_checkpoint = "{_model(tmp_path / "model")}"',
        "data": 'prompt_data = "x.jsonl"',
        "rollout": "rollout_max_response_len = 8",
    }
    text = "".join(f"[{name}]\n{line}\n" for name, line in tables.items())
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    return path


def _model(folder: Path) -> Path:
    write_tokenizer(folder)
    shape = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_bytes(codecs.BOM_UTF8 + json.dumps(shape).encode())
    return folder


def test_byte_order_marks_of_a_checkpoint(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    (folder / "chat_template.jinja").write_bytes(codecs.BOM_UTF8 + settings.pop("chat_template").encode())
    config.write_bytes(codecs.BOM_UTF8 + json.dumps(settings).encode())
    assert Tokenizer(folder).render([{"role": "user", "content": "hi"}]).startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "\\ud83d", "label": "x"}', r"lone surrogate"),
        (b'{"prompt": NaN, "label": "x"}', r"NaN, is not JSON"),
        (b'{"prompt": "a", "label": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "na\xdf", "label": "x"}', "not UTF-8"),
        (b'{"prompt": "\xed\xa0\xbd", "label": "x"}', "not UTF-8"),
        (b'{"prompt": "a", "label": "x"', "truncated"),
    ],
    ids=["surrogate", "nan", "deep", "latin-1", "surrogate bytes", "cut"],
)
def test_text_that_is_no_json_is_named(tmp_path: Path, tokenizer: Tokenizer, line: bytes, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL + line + b"\n" + JSONL)
    for load in (load_prompts, load_sft_examples):
        with pytest.raises(DataError, match=rf"a\.jsonl:4: invalid JSON .*{problem}") as caught:
            load(DataConfig(prompt_data=str(tmp_path / "a.jsonl")), tokenizer)
        assert len(caught.value.errors) == 1


def test_files_that_cannot_be_read_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "utf16.jsonl").write_text("x", encoding="utf-16")
    (tmp_path / "cut.json").write_text('[{"prompt": "a"}')
    (tmp_path / "values.json").write_text('[{"prompt": "a", "label": 1}, 3]')
    wrongs = {
        "utf16.jsonl": "the file is UTF-16; write it again in UTF-8",
        "cut.json": "invalid JSON",
        "values.json": ":2: int instead of an object",
    }
    for name, message in wrongs.items():
        with pytest.raises(DataError, match=message):
            load_prompts(DataConfig(prompt_data=str(tmp_path / name)), tokenizer)


def test_labels_are_checked_where_they_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)

    def check(label: Any) -> str | None:
        return f"the label {label!r} is no number" if label == "x" else None

    with pytest.raises(DataError, match=r"a\.jsonl:1: the label 'x' is no number; correct it") as caught:
        load_prompts(DataConfig(prompt_data=str(tmp_path / "a.jsonl")), tokenizer, check_label=check)
    assert [error.row for error in caught.value.errors] == [1, 2, 3]


def test_columns_of_parquet_that_python_lacks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = str(tmp_path / "a.parquet")
    nanoseconds, maps = pa.array([1, 2_500], pa.timestamp("ns", "UTC")), pa.map_(pa.string(), pa.int64())
    columns = {"prompt": ["a", "b"], "label": ["1", "2"], "time": nanoseconds}
    parquet.write_table(pa.table({**columns, "metadata": pa.array([[("k", 1)], None], maps)}), path)
    first, second = load_prompts(DataConfig(prompt_data=path), tokenizer)
    assert (first.metadata["k"], second.metadata["time"].microsecond) == (1, 2)  # pandas writes nanoseconds

    text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    parquet.write_table(pa.table({**columns, "prompt": text}), path)
    for rows in ("", "@[1:]"):
        with pytest.raises(DataError, match=r":2: column 'prompt' of type string cannot be read \(.*0xff"):
            load_prompts(DataConfig(prompt_data=path + rows), tokenizer)


def test_an_error_has_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = str(tmp_path / "a.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "prompt", "label"])
    parquet.write_table(twice, path)
    with pytest.raises(DataError, match="unreadable parquet") as caught:  # whose library lists the columns in lines
        load_prompts(DataConfig(prompt_data=path), tokenizer)
    assert "\n" not in str(caught.value)
