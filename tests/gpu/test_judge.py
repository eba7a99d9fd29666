"""A judge on GPUs of its own: a run with one can be repeated, and its replies are those of transformers.

Ranks do not share a GPU, so that a run with a judge needs two; the engine alone needs one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.gpu import machine
from tests.gpu.test_grpo import grpo
from tests.ranks import Ranks
from tests.worker.test_judge import LONGEST_REPLY, write_judge

ENGINE = machine.ENGINE | {"cuda_graph_bs_decode": [1, 8]}
QUESTIONS = [f"What is {i} plus {i}?" for i in range(12)]


@machine.needs(2)
def test_a_run_with_a_judge_is_repeated(warm: Path) -> None:
    judge, steps = write_judge(warm / "judge"), 3
    server_args = "attention_backend = 'triton', cuda_graph_bs_decode = [1, 8], mem_fraction_static = 0.3"
    settings = [
        "determinism.deterministic=true",
        "reward.rm_type=judge",
        f"reward.judge_hf_checkpoint={judge}",
        "reward.judge_num_gpus=1",
        f"reward.judge_sglang={{ {server_args} }}",
        "reward.judge_prompt='Question: {prompt} Response: {response} Grade it.'",
        f"reward.judge_arguments={{ max_tokens = {LONGEST_REPLY} }}",
        "reward.judge_default=-1.0",
    ]
    for name in ("judged", "again"):
        grpo(warm, name, 2, steps, *settings)
    comparison = compare(verify(warm / "judged"), verify(warm / "again"))
    assert comparison.equal, comparison.difference
    found = [step_data.read(warm / "judged", step) for step in range(steps)]
    rewards = [reward for one in found if one and one.samples for reward in one.samples.rewards]
    assert len(set(rewards)) > 5
    machine.measured("a judge of the quickstart", {"rewards": len(rewards), "different ones": len(set(rewards))})


@pytest.mark.parametrize("size", [pytest.param(1, marks=machine.needs(1)), pytest.param(2, marks=machine.needs(2))])
def test_replies_are_those_of_transformers(ranks: Ranks, tmp_path: Path, size: int) -> None:
    ranks.run(size, replies, write_judge(tmp_path / "judge"), ENGINE | {"tp_size": size})


def replies(folder: Path, server_args: dict[str, Any]) -> None:
    """In fp32, in which two programs round so little that no choice of a token depends on it."""
    import torch
    from transformers import AutoModelForCausalLM

    from miles_spmd.config import Config
    from miles_spmd.data.tokenizer import Tokenizer
    from miles_spmd.types.engine_group import JUDGE
    from miles_spmd.types.request import Request, SamplingParams
    from miles_spmd.worker.worker import make_engine

    config = Config(
        model={"hf_checkpoint": "none", "dtype": "float32"},
        data={"prompt_data": "none"},
        reward={"judge_hf_checkpoint": folder, "judge_num_gpus": 1, "judge_sglang": server_args},
    )
    engine, tokenizer = make_engine(config, JUDGE, refits=False), Tokenizer(folder)
    greedy = SamplingParams(max_new_tokens=LONGEST_REPLY, temperature=0.0)
    prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": text}])) for text in QUESTIONS]
    engine.submit([Request(str(number), prompt, greedy) for number, prompt in enumerate(prompts)])
    outputs = {}
    while not engine.idle:
        outputs |= {int(output.rid): output.output_ids for output in engine.step()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=device)
        found = model.generate(
            ids, do_sample=False, max_new_tokens=LONGEST_REPLY, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )
        assert outputs[number] == found[0, len(prompt) :].tolist()
    assert len({tuple(ids) for ids in outputs.values()}) > 3
    engine.close()
