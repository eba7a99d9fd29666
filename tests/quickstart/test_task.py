"""The quickstart's data and checkpoint, read back by a parser and libraries of their own."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from miles_spmd.config.load import load_config
from miles_spmd.data.examples import load_preference_pairs, load_sft_examples
from miles_spmd.data.prompts import load_prompts
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.quickstart.assets import HELDOUT_ROWS, SFT_ROWS, TRAIN_ROWS, build_assets
from miles_spmd.quickstart.task import data_files

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = {w: i for i, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])}
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
NUMBERS = DIGITS | {w: i for i, w in enumerate(TEENS, 10)} | {"twenty": 20}


def number(text: str) -> int:
    return sum(int(part) if part.isdigit() else NUMBERS[part] for part in text.split("-"))


def parse(row: dict[str, str]) -> tuple[list[int], str, int]:
    """Operands, asked notation and labelled number of a row."""
    match = re.fullmatch(r"(\w+) plus (\w+) plus (\w+) in (words|digits)", row["prompt"])
    assert match is not None
    assert (match[4] == "digits") == row["label"].isdigit()
    return [number(match[i]) for i in (1, 2, 3)], match[4], number(row["label"])


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    build_assets(folder)
    return folder


@pytest.fixture(scope="module")
def rows(assets: Path) -> dict[str, list[dict[str, str]]]:
    return {
        name: [json.loads(line) for line in (assets / f"{name}.jsonl").open()] for name in ("sft", "train", "heldout")
    }


def test_same_bytes_in_another_process(assets: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "miles_spmd.quickstart.assets", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env={"PYTHONHASHSEED": "77"}, cwd=CONFIGS.parent)
    digests = [
        {p.relative_to(f): hashlib.sha256(p.read_bytes()).hexdigest() for p in f.rglob("*") if p.is_file()}
        for f in (assets, tmp_path)
    ]
    assert len(digests[0]) == 10
    assert digests[0] == digests[1]


def test_labels_are_right_but_for_the_careless_demonstrations(rows: dict[str, list[dict[str, str]]]) -> None:
    for name in ("train", "heldout"):
        for row in rows[name]:
            operands, _, label = parse(row)
            assert label == sum(operands)
    forgotten: Counter[bool] = Counter()
    for row in rows["sft"]:
        operands, _, label = parse(row)
        assert label == sum(operands) or (10 <= sum(operands) < 20 and label == sum(operands) - 10)
        if 10 <= sum(operands) < 20:
            forgotten[label != sum(operands)] += 1
    assert forgotten[True] / forgotten.total() == pytest.approx(0.7, abs=0.03)


def test_a_preference_is_right_and_its_alternative_wrong(assets: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    kinds: Counter[int] = Counter()
    for name, questions in (("preferences", "train"), ("heldout_preferences", "heldout")):
        pairs = [json.loads(line) for line in (assets / f"{name}.jsonl").open()]
        assert [p["prompt"] for p in pairs] == [row["prompt"] for row in rows[questions]]
        for pair in pairs:
            operands, _, chosen = parse(pair | {"label": pair["chosen"]})
            _, _, rejected = parse(pair | {"label": pair["rejected"]})
            assert chosen == sum(operands)
            assert 0 <= rejected <= 27
            kinds[rejected - chosen] += 1
    assert set(kinds) == {-10, -1, 1}
    assert min(kinds.values()) / kinds.total() > 0.2


def test_held_out_problems_are_in_no_training_file(rows: dict[str, list[dict[str, str]]]) -> None:
    problems = {name: {tuple(sorted(parse(row)[0])) for row in part} for name, part in rows.items()}
    known = problems["sft"] | problems["train"]
    assert not problems["heldout"] & known
    assert len(problems["heldout"]) == 33
    assert len(known) == 220 - 33
    assert {sum(p) for p in problems["heldout"]} <= {sum(p) for p in problems["train"]}  # no answer is new


def test_no_prompt_comes_twice(rows: dict[str, list[dict[str, str]]]) -> None:
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len(prompts) == len(set(prompts)) == SFT_ROWS + TRAIN_ROWS + HELDOUT_ROWS
    for part in rows.values():
        asked = Counter(parse(row)[1] for row in part)
        assert asked["words"] / len(part) == pytest.approx(0.5, abs=0.05)


def test_what_imitation_can_reach(rows: dict[str, list[dict[str, str]]]) -> None:
    """Greedy imitation is right where no ten is to be forgotten: the accuracy that GRPO starts from."""
    sums = [sum(parse(row)[0]) for row in rows["heldout"]]
    assert 0.2 < sum(not 10 <= s < 20 for s in sums) / len(sums) < 0.4


def test_more_rows_than_there_are() -> None:
    with pytest.raises(ValueError, match="there are only 13440 training and 2560 held-out questions"):
        data_files(20_000, 1, 1)


def test_the_tokenizer_loses_nothing(assets: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    ours, theirs = Tokenizer(assets / "model"), AutoTokenizer.from_pretrained(assets / "model")
    unknown = theirs.unk_token_id
    for row in rows["heldout"] + rows["sft"][:200]:
        for text in row.values():
            ids = ours.encode(text)
            assert unknown not in ids
            assert ours.decode(ids) == text
            assert ids == theirs(text)["input_ids"]
            assert theirs.decode(ids) == text
        talk = [{"role": "user", "content": row["prompt"]}]
        assert ours.render(talk) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert len(ours.encode(row["label"])) <= 2
    assert unknown in ours.encode("seventy")


def test_transformers_loads_the_checkpoint(assets: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(assets / "model", output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.eos_token_id == Tokenizer(assets / "model").eos_token_id
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.05, rel=0.1)
    loss = model(torch.arange(5, 25)[None], labels=torch.arange(5, 25)[None]).loss.item()
    assert 3 < loss < 5  # of a random model over 40 tokens: about log 40 = 3.7


def test_the_recipes_load_what_the_assets_are(assets: Path) -> None:
    sft = load_config(CONFIGS / "quickstart_sft.toml", [], check_files=False)
    grpo = load_config(CONFIGS / "quickstart_grpo.toml", [], check_files=False)
    assert grpo.model.hf_checkpoint == sft.run_dir / "export"
    tokenizer = Tokenizer(assets / "model")
    home = sft.model.hf_checkpoint.parent
    examples = load_sft_examples(
        sft.data.model_copy(update={"prompt_data": str(assets / Path(sft.data.prompt_data).relative_to(home))}),
        tokenizer,
    )
    assert len(examples) == SFT_ROWS
    text = tokenizer.decode(examples[0].tokens.tolist(), skip_special_tokens=False)
    assert re.fullmatch(r"<\|user\|>.* in (words|digits)<\|assistant\|>[\w-]+<\|end\|>", text)
    for name, count in (("preferences.jsonl", TRAIN_ROWS), ("heldout_preferences.jsonl", HELDOUT_ROWS)):
        pairs = load_preference_pairs(sft.data, tokenizer, prompt_data=str(assets / name))
        assert len(pairs) == count
    for path, count in ((grpo.data.prompt_data, TRAIN_ROWS), (grpo.eval.eval_prompt_data["heldout"], HELDOUT_ROWS)):
        prompts = load_prompts(grpo.data, tokenizer, prompt_data=str(assets / Path(path).relative_to(home)))
        assert len(prompts) == count
        assert all(isinstance(p.label, str) for p in prompts)
        longest = max(len(tokenizer.encode(p.label)) + 1 for p in prompts)
        assert longest <= grpo.rollout.rollout_max_response_len
