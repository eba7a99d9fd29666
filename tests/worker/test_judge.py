"""Runs whose rewards come from a judge that engines of the run hold: real Megatron, SGLang and gloo; see
test_disaggregated.py."""

from __future__ import annotations

import json
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.ledger import step_data
from miles_spmd.ledger.compare import compare
from miles_spmd.types.phase import Phase
from tests.data.conftest import write_tokenizer
from tests.ranks import Ranks
from tests.worker.launched import START_SECONDS, Launch
from tests.worker.test_disaggregated import train
from tests.worker.tiny_run import write_checkpoint, write_config

PROMPT = "Prompt: {prompt}\nResponse: {response}\nReference: {label}\nGrade the response."
STEPS = 3
LONGEST_REPLY = 4
REWARD: dict[str, Any] = {
    "rm_type": "judge",
    "judge_num_gpus": 1,
    "judge_prompt": PROMPT,
    "judge_arguments": {"max_tokens": LONGEST_REPLY},
    "judge_default": -1.0,
}


def write_judge(folder: Path) -> Path:
    """A random Qwen3 of another shape than the policy's, whose replies are numbers nearly always."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=64,
            intermediate_size=96,
            head_dim=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )
    tokenizer = Tokenizer(folder)
    likely = [*(tokenizer.encode(digit)[0] for digit in "0123456789"), tokenizer.eos_token_id]
    with torch.no_grad():
        head = torch.zeros_like(model.lm_head.weight)
        head[likely] = 0.7 * torch.randn(len(likely), 64)
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge") / "model")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, judge: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    reward = REWARD | {"judge_hf_checkpoint": str(judge)}
    return write_config(folder, write_checkpoint(folder / "model"), reward=reward, megatron={"lr": 1e-2})


def scored(recipe: Path, folder: Path) -> list[tuple[str, str, float]]:
    """The rows, responses and rewards of a run, in order."""
    tokenizer, found = Tokenizer(recipe.parent / "model"), []
    for step in range(STEPS):
        recorded = step_data.read(folder, step)
        assert recorded is not None
        assert recorded.samples is not None
        samples = recorded.samples
        for uid, response, reward in zip(samples.uids, samples.responses.split(), samples.rewards, strict=True):
            found.append((uid, tokenizer.decode(response.tolist()), float(reward or 0.0)))
    return found


def test_runs_are_equal_whoever_judges(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    """The judge samples; neither the number of its engines nor where the policy is has an influence."""
    first = train(ranks, 2, recipe, tmp_path / "first")
    rewards = [reward for _, _, reward in scored(recipe, tmp_path / "first")]
    assert len(set(rewards)) > len(rewards) / 2
    for name, overrides in {"again": [], "two": ["judge_num_gpus=2"], "apart": ["rollout_num_gpus=1"]}.items():
        found = compare(first, train(ranks, 2 + len(overrides), recipe, tmp_path / name, *overrides))
        assert (name, found.steps, found.difference) == (name, [0, 1, 2], "")


def test_a_run_goes_on_with_its_judge(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    whole = train(ranks, 2, recipe, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_000002"
    resumed = train(ranks, 2, recipe, tmp_path / "resumed", f"checkpoint.load={checkpoint}")
    found = compare(whole, resumed)
    assert (found.steps, found.difference) == ([2], "")


@pytest.mark.parametrize("tp_size", [1, 2])
def test_scores_are_those_of_transformers(
    ranks: Ranks, recipe: Path, judge: Path, tmp_path: Path, tp_size: int
) -> None:
    arguments = f"judge_arguments={{ temperature = 0, max_tokens = {LONGEST_REPLY} }}"
    layout = [f"judge_num_gpus={tp_size}", f"judge_sglang={{ tp_size = {tp_size} }}"]
    train(ranks, 1 + tp_size, recipe, tmp_path / "run", arguments, *layout)
    rows = (recipe.parent / "data.jsonl").read_text().splitlines()
    samples = scored(recipe, tmp_path / "run")
    for uid, response, reward in samples:
        row = json.loads(rows[int(uid.rpartition(":")[2]) - 1])
        question = f"Prompt: {row['prompt']}\nResponse: {response}\nReference: {row['label']}\nGrade the response."
        reply = greedy(judge, question)
        assert reward == (float(reply) if reply.isdecimal() else -1.0), (question, reply)
    assert len({reward for _, _, reward in samples}) > 5


@cache
def greedy(folder: Path, question: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(
        **inputs, do_sample=False, max_new_tokens=LONGEST_REPLY, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    reply = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(reply).strip()


def test_a_held_out_set_has_a_judge_of_its_own(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    """Training is scored by a function, and the set by the judge and what it said before."""
    rows = recipe.parent / "data.jsonl"
    held_out = f"eval.sets=[{{ name = 'held', prompt_data = '{rows}@[0:4]', rm_type = 'judge', eval_interval = 3 }}]"
    found = []
    for name in ("one", "two"):
        train(ranks, 2, recipe, tmp_path / name, held_out, "rm_type=exact")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        metrics = json.loads(lines[0])
        found.append({key: value for key, value in metrics.items() if key.startswith("eval/")})
    assert found[0] == found[1]
    assert found[0]["eval/held"] > 1


# --- the judge fails --------------------------------------------------------------------------------------------------


def test_an_engine_that_fails_is_replaced(launch: Launch, judge: Path) -> None:
    """The new one reads the checkpoint again, and the scores are what they would have been."""
    settings = {"run": {"overwrite": True}, "reward": REWARD | {"judge_hf_checkpoint": str(judge)}}
    whole = launch(**settings)
    assert whole.launcher.wait(START_SECONDS) == 0, whole.report()
    expected = (whole.run_dir / "ledger" / "chain.jsonl").read_bytes()
    hurt = launch(Phase.ROLLOUT, 1, "engine", **settings)
    assert hurt.launcher.wait(START_SECONDS) == 0, hurt.report()
    (line,) = [line for line in hurt.stderr().splitlines() if line.startswith("miles-spmd: ")]
    assert "rollout, step 0, judge: RuntimeError: the deed is done; the engines are replaced, and " in line
    assert (hurt.run_dir / "ledger" / "chain.jsonl").read_bytes() == expected


def test_one_that_always_fails_ends_the_run(launch: Launch, judge: Path) -> None:
    reward = REWARD | {"judge_hf_checkpoint": str(judge)}
    run = launch(Phase.ROLLOUT, 1, "engines", rollout={"engine_replacements": 1}, reward=reward)
    assert run.launcher.wait(START_SECONDS) != 0
    first, last = [line for line in run.stderr().splitlines() if line.startswith("miles-spmd: ")]
    assert first.startswith("miles-spmd: warning: rank 1 (")
    assert last.startswith("miles-spmd: rank 1 (")
    assert "rollout, step 0, judge: RuntimeError: the deed is done (traceback in " in last


def test_a_judge_that_dies_ends_the_run(launch: Launch, judge: Path) -> None:
    reward = REWARD | {"judge_hf_checkpoint": str(judge)}
    run = launch(reward=reward, run={"num_rollout": 10000})
    run.wait_for_steps(2)
    os.kill(run.wait_for_ranks()[1], signal.SIGKILL)
    assert run.finish().startswith("rank 1 (")
