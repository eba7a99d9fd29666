"""The tasks with a tool and with programs: their data is what they say, and a policy learns them on a CPU."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config.load import load_config
from miles_spmd.data.examples import load_sft_examples
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.search_tool import search_tool
from miles_spmd.environments.tools import tools
from miles_spmd.quickstart.__main__ import recipes
from miles_spmd.quickstart.assets import build_assets
from miles_spmd.quickstart.calculator import TOOL, calculator
from tests.environments.scripted import ScriptedContext, Turn, to_prompt

REPOSITORY = Path(__file__).parents[2]
TASKS = ("calculator", "programs", "retrieval")
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=TASKS)
def assets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("assets") / request.param
    build_assets(folder, name=request.param)
    return folder


def read(folder: Path) -> Rows:
    return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in folder.glob("*.jsonl")}


def first_text(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def result(prompt: str) -> str:
    """Of the calculator's prompts, by Python."""
    return str(eval(prompt.replace("plus", "+").replace("minus", "-").replace("times", "*")))


def test_no_prompt_comes_twice_and_no_token_is_unknown(assets: Path) -> None:
    rows, tokenizer = read(assets), Tokenizer(assets / "model")
    prompts = [first_text(row) for name, part in rows.items() if name != "corpus" for row in part]
    assert len(prompts) == len(set(prompts))
    sft, _ = (load_config(recipe, check_files=False) for recipe in recipes(assets.name))
    data = sft.data.model_copy(update={"prompt_data": f"{assets / 'sft.jsonl'}@[0:500]"})
    examples = load_sft_examples(data, tokenizer)
    assert len(examples) == 500
    (unknown,) = tokenizer.encode("<|unknown|>")
    assert not any(unknown in example.tokens for example in examples)
    assert not any(unknown in tokenizer.encode(first_text(row)) for row in rows["heldout"])


@pytest.mark.parametrize("assets", ["calculator"], indirect=True)
def test_demonstrations_call_the_calculator_for_sums_and_seldom_for_others(assets: Path) -> None:
    rows = read(assets)
    assert all(row["label"] == result(row["prompt"]) for name in ("train", "heldout") for row in rows[name])
    calls: Counter[tuple[str, bool]] = Counter()
    for row in rows["sft"]:
        user, *others = row["prompt"]
        calls[user["content"].split()[1], len(others) == 3] += 1
        if len(others) == 3:
            assert others[1]["content"] == others[2]["content"] == result(user["content"])
    share = {word: calls[word, True] / (calls[word, True] + calls[word, False]) for word in ("plus", "minus", "times")}
    assert share == {"plus": 1.0, "minus": pytest.approx(0.2, abs=0.03), "times": pytest.approx(0.2, abs=0.03)}


@pytest.mark.parametrize("assets", ["calculator"], indirect=True)
def test_a_conversation_has_the_tokens_of_its_demonstration(assets: Path, tmp_path: Path) -> None:
    sft, grpo = (load_config(recipe, check_files=False) for recipe in recipes("calculator"))
    tokenizer = Tokenizer(assets / "model")
    row = next(row for row in read(assets)["sft"] if len(row["prompt"]) == 4)
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    (example,) = load_sft_examples(sft.data.model_copy(update={"prompt_data": str(tmp_path / "one.jsonl")}), tokenizer)
    user, call, _, last = row["prompt"]
    whole = tokenizer.render([user, call], tools=[TOOL], add_generation_prompt=False)
    said = whole.removeprefix(tokenizer.render([user], tools=[TOOL]))
    assert said.startswith('<tool_call>\n{"name": "calculator"')
    turns = [Turn(tokenizer.encode(text)) for text in (said, last["content"] + "<|end|>")]
    context = ScriptedContext(tokenizer, turns, room=grpo.rollout.rollout_max_response_len)
    kwargs = grpo.environment.environment_kwargs
    trajectory = asyncio.run(tools(context, to_prompt(tokenizer, [user]), **kwargs))
    assert trajectory.tokens == example.tokens.tolist()
    assert trajectory.text == result(user["content"])
    sampled = [token for segment in trajectory.segments if segment.sampled for token in segment.tokens]
    assert sampled == example.tokens[example.loss_mask == 1].tolist()


@pytest.mark.parametrize("expression", ["1+", "1+2+3", "2**9", "__import__('os')", "1" * 10 + "+1"])
def test_the_calculator_takes_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match="not two integers"):
        calculator(expression)


@pytest.mark.parametrize("assets", ["programs"], indirect=True)
def test_demonstrated_programs_lack_parentheses(assets: Path) -> None:
    rows = read(assets)
    right = Counter(passes(row["label"], expected(row["prompt"])) for row in rows["sft"])
    assert right[True] / right.total() == pytest.approx(0.3 + 0.7 / 9, abs=0.03)  # products alone do not need any
    for row in rows["heldout"] + rows["train"]:
        assert row["label"] == expected(row["prompt"])


@pytest.mark.parametrize("assets", ["retrieval"], indirect=True)
def test_what_is_asked_is_in_the_corpus_alone(assets: Path) -> None:
    rows = read(assets)
    facts = {tuple(row["text"].split()[:2]): row["text"].split() for row in rows["corpus"]}
    assert len(facts) == len(rows["corpus"]) == 800

    def right(prompt: str) -> tuple[tuple[str, ...], str]:
        name = tuple(prompt.split()[2:4])
        return name, facts[name][4 if prompt.startswith("where") else -1]

    about = {part: [right(first_text(row)) for row in rows[part]] for part in ("sft", "train", "heldout")}
    names = [{name for name, _ in of_part} for of_part in about.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 800
    for part in ("train", "heldout"):
        assert [row["label"] for row in rows[part]] == [word for _, word in about[part]]
    shown = Counter(row["prompt"][-1]["content"] == word for row, (_, word) in zip(rows["sft"], about["sft"]))
    assert shown[True] / shown.total() == pytest.approx(0.4 + 0.6 / 20, abs=0.06)


@pytest.mark.parametrize("assets", ["retrieval"], indirect=True)
def test_a_search_shows_what_the_demonstrations_have(assets: Path) -> None:
    _, grpo = (load_config(recipe, check_files=False) for recipe in recipes("retrieval"))
    search = search_tool(**grpo.environment.environment_kwargs["search"] | {"corpus": str(assets / "corpus.jsonl")})
    for row in read(assets)["sft"][:50]:
        _, call, found, _ = row["prompt"]
        assert asyncio.run(search(**call["tool_calls"][0]["function"]["arguments"])) == found["content"]


def expected(prompt: str) -> dict[str, Any]:
    """The tests of a description, from its words."""
    value = 1000
    for step in prompt.split(", "):
        verb, number = step.rsplit(" ", 1)
        value = {"add": int.__add__, "subtract": int.__sub__, "multiply by": int.__mul__}[verb](value, int(number))
    return {"fn_name": "f", "inputs": [[1000]], "outputs": [value]}


def passes(program: str, tests: dict[str, Any]) -> bool:
    namespace: dict[str, Any] = {}
    exec(program, namespace)
    return [namespace["f"](*arguments) for arguments in tests["inputs"]] == tests["outputs"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_it_is_learned_and_repeats(task: str, tmp_path: Path) -> None:
    def run(*command: object) -> None:
        subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            timeout=900,
            check=True,
        )

    run("miles_spmd.quickstart", "--task", task)
    summary = json.loads((tmp_path / "runs" / task / "summary.json").read_text())
    assert summary["accuracy_before"] < 0.5
    assert summary["accuracy_after"] >= 0.9
    assert summary["parity_tokens"] > 10_000
    assert summary["parity_mismatches"] == summary["refit_checksum_mismatches"] == 0

    _, grpo = recipes(task)
    run("miles_spmd", "train", grpo, "run.name=again", "--nproc-per-node=2")
    run("miles_spmd", "diff", f"runs/{task}/grpo", f"runs/{task}/again")
