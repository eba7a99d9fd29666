"""Rollout, training step and refit at the size of Qwen3-0.6B: right against transformers, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist

from miles_spmd.config import Config
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence
from tests.generation.conformance import finish, request, run
from tests.gpu.machine import ENGINE, measured, needs
from tests.ranks import Ranks

T = TypeVar("T")

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
REQUESTS, PROMPT, ANSWER = 256, 256, 256
PER_MICRO_BATCH = 32


def write_model(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(3)  # or all tokens would be about equally likely
    model.to(torch.bfloat16).save_pretrained(folder)


class Clock:
    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {}

    def __call__(self, name: str, function: Callable[[], T]) -> T:
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        self.numbers[f"{name}, s"] = time.perf_counter() - began
        return result

    def gap(self, name: str, a: list[np.ndarray], b: list[np.ndarray]) -> None:
        """Mean and largest difference of the log-probs of the answers, where there are any."""
        if not (a and b):
            return
        difference = np.abs(np.concatenate(a) - np.concatenate(b))
        self.numbers |= {f"|{name}|, mean": float(difference.mean()), f"|{name}|, max": float(difference.max())}


def reference_log_probs(folder: Path, texts: list[list[int]], dtype: torch.dtype) -> list[np.ndarray]:
    """Of the answers, by transformers computing in ``dtype`` with the same bf16 weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()
    with torch.no_grad():
        scores = [model(torch.tensor([text[:-1]], device="cuda")).logits[0, PROMPT - 1 :] for text in texts]
    return [
        score.float().log_softmax(-1).gather(1, torch.tensor(text[PROMPT:], device="cuda")[:, None])[:, 0].cpu().numpy()
        for score, text in zip(scores, texts)
    ]


def batch_of(texts: list[list[int]], log_probs: list[np.ndarray], part: int, parts: int) -> list[MicroBatch]:
    """Every ``parts``-th sequence, from the ``part``-th on."""

    def sequence(number: int) -> TrainSequence:
        weights, rollout = np.zeros((2, PROMPT + ANSWER), np.float32)
        weights[PROMPT:] = 1 / (ANSWER * len(texts))
        rollout[PROMPT:] = log_probs[number]
        advantages = np.full(PROMPT + ANSWER, number % 2 * 2 - 1, np.float32)
        return TrainSequence(np.asarray(texts[number], np.int32), weights, advantages, rollout)

    sequences = [sequence(i) for i in range(part, len(texts), parts)]
    return [sequences[i : i + PER_MICRO_BATCH] for i in range(0, len(sequences), PER_MICRO_BATCH)]


def spine(folder: Path, megatron: dict[str, Any], engine_tp: int) -> dict[str, Any]:
    from miles_spmd.algorithms.losses import make_loss
    from miles_spmd.generation.sglang.engine import SglangEngine
    from miles_spmd.models import load_family
    from miles_spmd.training.trainer import Trainer

    clock = Clock()
    model = {"hf_checkpoint": folder, "dtype": "bfloat16"}
    config = Config.model_validate(
        {"model": model, "data": {"prompt_data": "none"}, "megatron": {"lr": 1e-4, "clip_grad": 1.0} | megatron}
    )
    trainer = clock("build trainer", lambda: Trainer(config, load_family(folder), make_loss("rl", config.algorithm)))
    server_args = ENGINE | {"cuda_graph_bs_decode": [1, 8, 64, 256], "tp_size": engine_tp}
    engine = clock(
        "build engine", lambda: SglangEngine(folder, dtype="bfloat16", server_args=server_args, context_length=4096)
    )
    try:
        work(clock, folder, trainer, engine)
    finally:
        engine.close()
    return clock.numbers


def work(clock: Clock, folder: Path, trainer: Any, engine: Any) -> None:
    """Two engines of one rank each are given the same requests; what the first answers is trained on."""
    from miles_spmd.weights.refit import Refit

    refit = Refit(trainer.weights(), trainer.layout(), engine.weights(), engine.layout(), bucket_bytes=256 << 20)
    clock("first refit", refit.run)
    engine.commit(0)
    is_as_sglang_loads(engine, folder)

    # rollout
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 150_000, (REQUESTS, PROMPT)).tolist()
    run(engine, [request("warm-up", prompts[0], max_new_tokens=8)])
    asked = [
        request(str(i), prompts[i], seed=i, ignore_eos=True, max_new_tokens=ANSWER, prompt_log_probs=False)
        for i in range(REQUESTS)
    ]
    outputs = clock("rollout", lambda: run(engine, asked))
    clock.numbers["rollout, tokens/s"] = REQUESTS * ANSWER / clock.numbers["rollout, s"]
    texts = of_rank_0([prompts[i] + outputs[str(i)].output_ids for i in range(REQUESTS)])
    of_engine = of_rank_0([np.asarray(outputs[str(i)].output_log_probs, np.float32) for i in range(REQUESTS)])

    # the trainer's turn
    before = torch.cuda.mem_get_info()[0]
    clock("release", engine.release)
    clock.numbers["given back by the engine, GiB"] = (torch.cuda.mem_get_info()[0] - before) / 2**30
    pool = engine._scheduler.tp_worker.model_runner.token_to_kv_pool
    held = [*engine.weights().values(), *(buffer for layer in range(28) for buffer in pool.get_kv_buffer(layer))]
    assert clock.numbers["given back by the engine, GiB"] * 2**30 > sum(tensor.nbytes for tensor in held)
    part, parts = trainer.where.dp_rank, trainer.where.dp_size
    batch = batch_of(texts, of_engine, part, parts)
    texts, of_engine = texts[part::parts], of_engine[part::parts]
    clock("log-probs, first time", lambda: trainer.log_probs(batch))
    of_trainer = answers(clock("log-probs", lambda: trainer.log_probs(batch)).log_probs)
    exact, rounded = (reference_log_probs(folder, texts[:16], dtype) for dtype in (torch.float32, torch.bfloat16))
    clock.gap("transformers bf16 - fp32", rounded, exact)
    clock.gap("engine - transformers fp32", of_engine[:16], exact)
    clock.gap("trainer - transformers fp32", of_trainer[:16], exact)
    clock.gap("engine - trainer", of_engine, of_trainer)
    clock("train step, first time", lambda: trainer.train_step(batch))
    torch.cuda.reset_peak_memory_stats()
    result = clock("train step", lambda: trainer.train_step(batch))
    clock.numbers["train step, tokens/s"] = REQUESTS * (PROMPT + ANSWER) / clock.numbers["train step, s"]
    clock.numbers["train step, peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    assert not result.skipped
    after = answers(trainer.log_probs(batch).log_probs)

    # the engine's turn, with what the trainer has learnt
    clock("resume", engine.resume)
    for name in ("refit with checksums", "refit without"):
        clock(name, refit.run)
        refit.checksums = False
    clock("commit", lambda: engine.commit(1))
    engine.submit([request(str(i), texts[i], max_new_tokens=1, prompt_log_probs=True) for i in range(32)])
    read = finish(engine)
    of_engine = [np.asarray(read[str(i)].prompt_log_probs, np.float32)[PROMPT - 1 :] for i in range(32)]
    clock.gap("engine - trainer, after two updates", of_engine, after[:32])
    clock.gap("trainer, after - before", after[:32], of_trainer[:32])


def of_rank_0(value: T) -> T:
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def answers(log_probs: list[np.ndarray] | None) -> list[np.ndarray]:
    """Nothing on the ranks that do not report."""
    return [values[PROMPT:] for values in log_probs or []]


def is_as_sglang_loads(engine: Any, folder: Path) -> None:
    """A refit leaves in the engine, bit for bit, what its own loader makes of the checkpoint."""
    from safetensors.torch import load_file

    refitted = {name: tensor.clone() for name, tensor in engine.weights().items()}
    engine._model.load_weights(load_file(folder / "model.safetensors").items())
    for name, tensor in engine.weights().items():
        assert torch.equal(refitted[name], tensor), name


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def checkpoint(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3-0.6b")
    ranks.run(1, write_model, folder)
    return folder


@pytest.mark.parametrize(
    ("world", "megatron", "engine_tp"),
    [
        pytest.param(1, {}, 1, marks=needs(1)),
        pytest.param(2, TP2, 2, marks=needs(2)),
        pytest.param(2, TP2, 1, marks=needs(2)),
        pytest.param(2, {"use_distributed_optimizer": True}, 2, marks=needs(2)),
    ],
)
def test_qwen3_600m(ranks: Ranks, checkpoint: Path, world: int, megatron: dict[str, Any], engine_tp: int) -> None:
    ranks.stop()  # an engine's memory stays reserved in its process: begin with new ones
    numbers = ranks.run(world, spine, checkpoint, megatron, engine_tp, timeout=200)[0]
    layout = f"{world} GPUs, trainer {megatron}, engine TP {engine_tp}"
    measured(f"Qwen3-0.6B shape, bf16, {REQUESTS} x ({PROMPT} + {ANSWER}) tokens, {layout}", numbers)
    # What bf16 costs transformers is the yardstick; two programs that round differently are further from each other.
    rounding = numbers["|transformers bf16 - fp32|, mean"]
    assert 0 < rounding < 0.05
    for program in ("engine", "trainer"):
        assert numbers[f"|{program} - transformers fp32|, mean"] < 1.2 * rounding
    for pair in ("engine - trainer", "engine - trainer, after two updates"):
        assert numbers[f"|{pair}|, mean"] < 1.5 * rounding
        assert numbers[f"|{pair}|, max"] < 0.3
    assert numbers["|trainer, after - before|, mean"] > 10 * rounding
