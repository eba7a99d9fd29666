"""The account of a rank's memory, what an engine releases by it, and the messages where memory does not suffice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles_spmd.config import Config
from miles_spmd.models import load_family
from miles_spmd.models.random import SHAPES
from miles_spmd.planning.memory_estimate import estimate_memory, needed_tokens
from miles_spmd.planning.parallel_layout import ParallelLayout
from miles_spmd.planning.release import GIB, Release, choose_release, peaks, planned_release, with_margin
from tests.models import tiny
from tests.ranks import Ranks
from tests.training.cases import config, held, sequences

BATCH = [sequences((9, 17)), sequences((30, 12), seed=1)]


# --- what the engine releases ----------------------------------------------------------------------------------------


def turns(run: Config) -> tuple[list[Any], dict[str, np.ndarray], list[str]]:
    """Three times: refit, responses, log-probs, an optimizer step. Returns results; weights; what was released."""
    import torch.distributed as dist

    from miles_spmd.training.roles import Roles
    from miles_spmd.worker.device_turns import DeviceTurns
    from miles_spmd.worker.memory_account import MemoryAccount
    from miles_spmd.worker.stopwatch import Stopwatch
    from miles_spmd.worker.worker import make_engine
    from tests.generation.conformance import prompt, request
    from tests.generation.conformance import run as generate

    memory = MemoryAccount(run, dist.get_world_size())
    roles = Roles(run)
    memory.trainer = roles.memory
    if run.train.offload_train:
        roles.move_out()
    engine: Any = make_engine(run)
    memory.built(engine.memory)
    own = DeviceTurns(run, engine, roles, Stopwatch(), memory)
    asked = [request(f"r{i}", prompt(i % 2, 9 + i), seed=i, ignore_eos=True) for i in range(4)]
    whole = engine.memory()
    seen, results = [], []
    for version in range(3):
        own.refit(version)
        assert engine.memory() == whole
        outputs = generate(engine, asked)
        results += [(outputs[one.rid].output_ids, outputs[one.rid].output_log_probs) for one in asked]
        assert {span for output in outputs.values() for span in output.weight_versions} == {(version, 24)}
        own.release()
        now = engine.memory()
        assert roles.offloaded_bytes == 0
        seen.append("nothing" if now == whole else "kv_cache" if now.weights else "all")
        results.append(repr(roles.actor.log_probs(BATCH)))
        own.release()  # asked again in the same turn: nothing more to release
        assert engine.memory() == now
        results.append(repr(roles.actor.train_step(BATCH)))
        memory.record("optimizer step", worked=True)
    engine.close()
    return results, held(roles.actor).weights, seen


@pytest.mark.parametrize("offload", [False, True])
def test_nothing_depends_on_what_is_released(ranks: Ranks, offload: bool) -> None:
    expected: Any = None
    for wanted, given in (("nothing", "nothing"), ("kv_cache", "kv_cache"), ("all", "all"), ("auto", "nothing")):
        run = config("qwen3", {"lr": 1e-2}, rollout={"offload_rollout": wanted}, train={"offload_train": offload})
        ((results, weights, seen),) = ranks.run(1, turns, run)
        assert seen == [given] * 3
        expected = expected or (results, weights)
        assert results == expected[0]
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, expected[1][name], name)


def test_lagging_engines_keep_their_weights(ranks: Ranks) -> None:
    run = config("qwen3", rollout={"offload_rollout": "all"}, refit={"update_weights_interval": 2})
    ((_, _, seen),) = ranks.run(1, turns, run)
    assert seen == ["kv_cache"] * 3


def two_choices() -> str:
    import torch.distributed as dist

    from miles_spmd.worker.memory_account import agreed

    return agreed([Release.NOTHING, Release.KV_CACHE][dist.get_rank()])


def test_all_ranks_release_the_same(ranks: Ranks) -> None:
    assert ranks.run(2, two_choices) == [Release.KV_CACHE] * 2


def test_the_least_that_suffices() -> None:
    for needed, release in ((10, "nothing"), (11, "kv_cache"), (15, "kv_cache"), (16, "all")):
        assert choose_release(of_shape("absent"), needed, room=10, kv_cache=5) == release
    lagging = of_shape("absent", refit={"update_weights_interval": 2})
    assert choose_release(lagging, 16, room=10, kv_cache=5) is Release.KV_CACHE
    assert with_margin(8 * GIB, 0.25) == 12 * GIB


def of_shape(shape: str, **tables: Any) -> Config:
    return Config(model={"hf_checkpoint": shape}, data={"prompt_data": "none"}, **tables)


@pytest.mark.parametrize(("device", "release"), [(150, "nothing"), (100, "kv_cache"), (70, "all")])
def test_a_small_device_takes_more_of_the_engine(device: int, release: str) -> None:
    """1.7B and 40 GiB of cache."""
    run = of_shape("absent", train={"max_tokens_per_gpu": 16384})
    plan = estimate_memory(run, load_family(SHAPES["qwen3-1.7b"]), ParallelLayout.of(run, 1))
    assert planned_release(run, plan, 40 * GIB, device * GIB) == release
    assert peaks(plan, 40 * GIB, Release(release))[0] < device * GIB
    forced = of_shape("absent", rollout={"offload_rollout": "all"})
    assert planned_release(forced, plan, 40 * GIB, device * GIB) is Release.ALL


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_cache_for_what_can_run_at_a_time(tmp_path: Path) -> None:
    folder = tiny.checkpoint("qwen3")  # a context of 64
    (tmp_path / "eval.jsonl").write_text('{"prompt": "x"}\n' * 300)

    def tokens(engine_ranks: int = 1, **tables: dict[str, Any]) -> int | None:
        base = {"prompt_data": "none", "rollout_max_prompt_len": 10} | tables.pop("data", {})
        rollout = {"rollout_batch_size": 5, "n_samples_per_prompt": 4, "rollout_max_response_len": 20}
        rollout |= tables.pop("rollout", {})
        run = Config(model={"hf_checkpoint": folder}, data=base, rollout=rollout, **tables)
        return needed_tokens(run, engine_ranks)

    assert tokens() == 20 * 31 + 256
    assert tokens(2) == 12 * 31 + 256  # 3 prompts of 5
    assert tokens(4, sglang={"tp_size": 2}) == 12 * 31 + 256
    assert tokens(sglang={"page_size": 16}) == 20 * 48 + 256
    assert tokens(sglang={"max_running_requests": 8}) == 8 * 31 + 256
    assert tokens(data={"rollout_max_prompt_len": None}) == 20 * 65 + 256  # no longer than the context
    assert tokens(data={"rollout_max_prompt_len": None}, train={"max_tokens_per_gpu": 32}) == 20 * 33 + 256
    sets = {"eval_interval": 1, "eval_prompt_data": {"a": str(tmp_path / "eval.jsonl"), "b": "absent.jsonl"}}
    assert tokens(eval=sets) == 300 * 31 + 256
    assert tokens(eval=sets | {"n_samples_per_eval_prompt": 2, "eval_max_response_len": 30}) == 600 * 41 + 256
    for own in ({"mem_fraction_static": 0.5}, {"max_total_tokens": 100}):
        assert tokens(sglang=own) is None


def largest_rollout(run: Config) -> tuple[int, int]:
    from miles_spmd.worker.worker import make_engine
    from tests.generation.conformance import prompt, request

    engine: Any = make_engine(run)
    r = run.rollout
    count = r.rollout_batch_size * r.n_samples_per_prompt
    longest = run.data.rollout_max_prompt_len or 0
    engine.submit(
        [
            request(str(i), prompt(i, longest), ignore_eos=True, max_new_tokens=r.rollout_max_response_len)
            for i in range(count)
        ]
    )
    retracted = most = 0
    while not engine.idle:
        engine.step()
        most = max(most, len(engine._scheduler.running_batch.reqs))
        retracted = max(retracted, *(req.retraction_count for req in engine._scheduler.waiting_queue), 0)
    engine.close()
    return most, retracted


def test_the_largest_rollout_fits_its_cache(ranks: Ranks) -> None:
    run = config(
        "qwen3",
        rollout={"rollout_batch_size": 6, "n_samples_per_prompt": 5, "rollout_max_response_len": 30},
        sglang={"schedule_conservativeness": 0.01},  # SGLang lets in what it hopes will fit
    )
    run = run.model_copy(update={"data": run.data.model_copy(update={"rollout_max_prompt_len": 20})})
    assert ranks.run(1, largest_rollout, run) == [(30, 0)]


# --- too little ------------------------------------------------------------------------------------------------------


def account_of(run: Config) -> None:
    from miles_spmd.generation.engine import EngineMemory
    from miles_spmd.types.phase import Phase
    from miles_spmd.worker.memory_account import DeviceMemoryError, MemoryAccount

    warnings: list[str] = []
    memory = MemoryAccount(run, 1, warn=warnings.append)
    memory.require_room(training=True)
    assert not warnings
    grown = 5 * GIB
    memory.trainer = lambda: {"parameters": memory.plan.parameters + grown, "gradients": memory.plan.gradients}
    memory.built(lambda: EngineMemory(3 * GIB, 2 * GIB))
    memory.begin(Phase.TRAIN, 7)
    memory.record("optimizer step")
    parameters, weights = warnings  # and the run goes on
    assert "more memory in use than planned: parameters 5.00 GiB instead of 0.00" in parameters
    assert "more memory in use than planned: engine weights 3.00 GiB instead of 0.00" in weights
    assert "train.memory_allowance (0.25)" in parameters
    assert "What helps: lower train.max_tokens_per_gpu" in parameters
    grown = 6 * GIB
    memory.record("optimizer step")
    assert len(warnings) == 2  # once for each holder
    assert memory.measured["parameters"] == memory.plan.parameters + 6 * GIB
    grown = 5 * GIB
    with pytest.raises(DeviceMemoryError) as caught, memory.explaining():
        torch.empty(2**60, dtype=torch.uint8)
    text = str(caught.value)
    assert "no memory left on the host: [enforce fail" in text
    assert "held: parameters 5.00, engine weights 3.00, KV cache 2.00" in text
    assert text.endswith("raise megatron.tensor_model_parallel_size (1)")
    assert "What helps: lower train.max_tokens_per_gpu (8192); set megatron.recompute_granularity" in text
    with pytest.raises(ZeroDivisionError), memory.explaining():
        _ = 1 / 0
    assert 0 < memory.take()["memory/train"] < 100
    assert memory.take() == {}


def test_what_the_account_reports(ranks: Ranks) -> None:
    ranks.run(1, account_of, config("qwen3"))


def measured_release(run: Config) -> list[str]:
    from miles_spmd.generation.engine import EngineMemory
    from miles_spmd.platform import device_memory
    from miles_spmd.worker.memory_account import ACTIVATIONS, MemoryAccount

    memory = MemoryAccount(run, 1)
    memory.built(lambda: EngineMemory(GIB, 2 * GIB))
    choices = [str(memory.release(0))]
    memory.measured[ACTIVATIONS] = 2 * device_memory.read().total  # more than there is, so all of the engine has to go
    return [*choices, str(memory.release(0))]


def test_a_measured_peak_replaces_an_estimate_that_was_too_low(ranks: Ranks) -> None:
    assert ranks.run(1, measured_release, config("qwen3")) == [["nothing", "all"]]


def room_warnings(run: Config) -> list[str]:
    from miles_spmd.worker.memory_account import MemoryAccount

    warnings: list[str] = []
    MemoryAccount(run, 1, warn=warnings.append).require_room(training=True)
    few = len(warnings)
    MemoryAccount(run, 1, trains=False, warn=warnings.append).require_room(training=True)  # the engine alone would fit
    assert len(warnings) == few
    return warnings


def test_an_estimate_beyond_the_device_is_a_warning(ranks: Ranks, tmp_path: Path) -> None:
    shape = SHAPES["qwen3-0.6b"] | {"num_hidden_layers": 2, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    run = of_shape(str(tmp_path), train={"max_tokens_per_gpu": 2**32})  # no host has activations of that
    (warnings,) = ranks.run(1, room_warnings, run)
    (text,) = warnings
    assert text.startswith("training takes at least")
    assert "planned: activations" in text
    assert "What helps: lower train.max_tokens_per_gpu (4294967296)" in text


def refused(run: Config) -> str:
    from miles_spmd.worker.memory_account import MemoryAccount, MemoryPlanError

    with pytest.raises(MemoryPlanError) as caught:
        MemoryAccount(run, 1).require_room(training=True)
    return str(caught.value)


def test_states_beyond_the_device_are_refused_before_anything_is_built(ranks: Ranks, tmp_path: Path) -> None:
    shape = SHAPES["qwen3-0.6b"] | {"num_hidden_layers": 2, "vocab_size": 10**9}  # 1e12 parameters
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (text,) = ranks.run(1, refused, of_shape(str(tmp_path)))
    assert text.startswith("training takes at least")
    assert "planned: optimizer" in text
    assert "What helps: lower train.max_tokens_per_gpu" in text
