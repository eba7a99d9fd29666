"""What is particular to SGLang as an engine: settings, place in the world, cache, exactness on a CPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from miles_spmd.types.request import Output
from miles_spmd.worker.service import step
from tests.generation.checkpoints import CONTEXT, EOS, Reference
from tests.generation.conformance import TOLERANCE, difference, engine_of, finish, prompt, refit, request, run
from tests.ranks import Ranks


def two_engines(folders: list[Path], tp_size: int) -> tuple[int, list[bool], dict[str, Output]]:
    """Each engine serves its own requests with its own weights; every rank also says when it was idle."""
    number = dist.get_rank() // tp_size
    with engine_of("sglang", folders[number], tp_size=tp_size) as engine:
        engine.submit(
            [
                request(f"r{i}", prompt(i, 8 + i), ignore_eos=True, max_new_tokens=8 + 8 * number, seed=i)
                for i in range(4)
            ]
        )
        idle, outputs = [engine.idle], {}
        while not engine.idle:
            outputs |= {output.rid: output for output in engine.step()}
            idle.append(engine.idle)
        return number, idle, outputs


@pytest.mark.parametrize(("world_size", "tp_size"), [(2, 1), (4, 2)])
def test_engines_share_a_world(ranks: Ranks, folders: list[Path], world_size: int, tp_size: int) -> None:
    answers = ranks.run(world_size, two_engines, folders, tp_size)
    for number, _, outputs in answers:
        reference = Reference(folders[number])
        for i in range(4):
            asked = request(f"r{i}", prompt(i, 8 + i))
            assert len(outputs[asked.rid].output_ids) == 8 + 8 * number
            assert difference(reference, asked, outputs[asked.rid]) < TOLERANCE
    for first in range(0, world_size, tp_size):
        assert all(answer == answers[first] for answer in answers[first : first + tp_size])


def exactness(folders: list[Path]) -> None:
    """Alone or in company, after a cached prompt or not, decoded or read back: the same log-probs to the bit."""
    with engine_of("sglang", folders[0]) as engine:
        asked = [
            request(f"r{i}", prompt(i % 9, 5 + i % 9), seed=i, ignore_eos=True, max_new_tokens=80) for i in range(40)
        ]
        together = run(engine, asked)
        for one in (asked[0], asked[8], asked[23]):
            assert run(engine, [one])[one.rid] == together[one.rid]  # cached
            engine.flush()
            assert run(engine, [one])[one.rid] == together[one.rid]
        engine.flush()
        pair = run(engine, [asked[39], asked[23]])
        assert pair == {one.rid: together[one.rid] for one in (asked[39], asked[23])}
        engine.flush()
        texts = {one.rid: one.input_ids + together[one.rid].output_ids for one in asked}
        read = run(engine, [request(rid, ids, prompt_log_probs=True, max_new_tokens=1) for rid, ids in texts.items()])
        for one in asked:
            log_probs = read[one.rid].prompt_log_probs
            assert log_probs is not None
            assert log_probs[len(one.input_ids) - 1 :] == together[one.rid].output_log_probs


def test_log_probs_depend_on_the_request_alone(ranks: Ranks, folders: list[Path]) -> None:
    ranks.run(1, exactness, folders)


def crowded(folders: list[Path], server_args: dict[str, Any]) -> int:
    """Small caches and small prefills change when things are computed, not what comes out."""
    reference = Reference(folders[0])
    asked = [
        request(f"r{i}", prompt(i, 20 + 3 * i), seed=i, ignore_eos=True, max_new_tokens=60, prompt_log_probs=i % 2 == 0)
        for i in range(12)
    ]
    retracted = 0
    with engine_of("sglang", folders[0], **server_args) as engine:
        engine.submit(asked)
        outputs = {}
        while not engine.idle:
            outputs |= {output.rid: output for output in engine.step()}
            retracted = max(retracted, *(req.retraction_count for req in engine._scheduler.waiting_queue), 0)
        for one in asked:
            assert len(outputs[one.rid].output_ids) == 60
            assert difference(reference, one, outputs[one.rid]) < TOLERANCE
            if one.return_prompt_log_probs:
                got = torch.tensor(outputs[one.rid].prompt_log_probs).double()
                torch.testing.assert_close(got, reference.of_tokens(one.input_ids), atol=TOLERANCE, rtol=0)
        if engine.leader:
            limit = server_args.get("max_total_tokens", CONTEXT + 1)
            if limit <= CONTEXT:
                with pytest.raises(ValueError, match=f"big: .*do not fit SGLang's cache of {limit} tokens"):
                    engine.submit([request("big", prompt(0, 100), max_new_tokens=CONTEXT - 100)])
        # aborted while its prompt is being read in pieces
        engine.submit([request("piecewise", prompt(1, 100), ignore_eos=True), request("next", prompt(2, 9))])
        engine.step()
        engine.abort(["piecewise"])
        left = finish(engine)
        assert set(left) == {"piecewise", "next"}
        assert len(left["piecewise"].output_ids) <= 2
        assert difference(reference, request("next", prompt(2, 9)), left["next"]) < TOLERANCE
    return retracted


@pytest.mark.parametrize(
    ("server_args", "retracts"),
    [
        ({"chunked_prefill_size": 16, "max_running_requests": 5}, False),
        ({"max_total_tokens": 150, "schedule_conservativeness": 0.1}, True),
        ({"disable_radix_cache": True, "enable_deterministic_inference": True}, False),
        ({"tp_size": 2, "chunked_prefill_size": 32, "max_total_tokens": 150, "schedule_conservativeness": 0.1}, True),
    ],
)
def test_small_caches(ranks: Ranks, folders: list[Path], server_args: dict[str, Any], retracts: bool) -> None:
    counts = ranks.run(server_args.get("tp_size", 1), crowded, folders, server_args)
    assert (counts[0] > 0) == retracts
    assert len(set(counts)) == 1


def in_order(folders: list[Path]) -> None:
    """One request runs at a time; those that wait begin by their order, and by their arrival where it is equal."""
    with engine_of("sglang", folders[0], max_running_requests=1, max_total_tokens=500) as engine:
        assert engine.cache_tokens == 500
        engine.submit([request("first", prompt(9, 8), max_new_tokens=4)])
        engine.step()
        orders = {"a": 3, "b": 1, "c": 3, "d": 0, "e": 1}
        engine.submit(
            [
                msgspec.structs.replace(request(rid, prompt(i, 8), max_new_tokens=2), order=order)
                for i, (rid, order) in enumerate(orders.items())
            ]
        )
        assert list(finish(engine)) == ["first", "d", "b", "e", "a", "c"]
    with engine_of("sglang", folders[0], disable_radix_cache=True) as engine:
        assert engine.cache_tokens is None


def test_requests_wait_in_order(ranks: Ranks, folders: list[Path]) -> None:
    ranks.run(1, in_order, folders)


def starved(folders: list[Path]) -> None:
    """Batches of more than a few requests find no memory, in the middle of answers: all come all the same."""
    asked = [request(f"r{i}", prompt(i, 9 + i), seed=i, ignore_eos=True, max_new_tokens=9 + i) for i in range(12)]
    with engine_of("sglang", folders[0]) as engine:
        expected = run(engine, asked)
        run_batch, sizes, most = engine._scheduler.run_batch, [], 3

        def starving(batch: Any) -> Any:
            sizes.append(batch.batch_size())
            if len(sizes) > 10 and batch.batch_size() > most:
                torch.empty(2**60, dtype=torch.uint8)
            return run_batch(batch)

        engine._scheduler.run_batch = starving
        engine.submit(asked)
        outputs: dict[str, Output] = {}
        retries = 0
        while not engine.idle:
            finished = step(engine)
            retries += finished is None
            outputs |= {output.rid: output for output in finished or []}
        same_tokens(outputs, expected)
        assert retries == 2  # 10 were left: 5, 2
        assert [size for size in sizes if size > most][-2:] == [10, 5]
        # one that was stopped meanwhile stays stopped; what finds no memory alone is given up
        engine.submit(asked[:2])
        step(engine)
        engine.abort(["r1"])
        most = 1
        assert step(engine) is None or not engine.idle
        left: dict[str, Output] = {}
        while not engine.idle:
            left |= {output.rid: output for output in step(engine) or []}
        same_tokens({"r0": left["r0"]}, {"r0": expected["r0"]})
        assert len(left["r1"].output_ids) < len(expected["r1"].output_ids)
        most = 0
        engine.submit(asked[:1])
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            step(engine)


def same_tokens(outputs: dict[str, Output], expected: dict[str, Output]) -> None:
    assert outputs.keys() == expected.keys()
    for rid, output in outputs.items():
        assert output.output_ids == expected[rid].output_ids
        assert output.output_log_probs == pytest.approx(expected[rid].output_log_probs, abs=TOLERANCE)


def test_too_little_memory(ranks: Ranks, folders: list[Path]) -> None:
    ranks.run(1, starved, folders)


def construction(folders: list[Path]) -> None:
    from miles_spmd.generation.sglang.engine import SglangEngine

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    threads = torch.get_num_threads()
    with engine_of("sglang", folders[0], max_total_tokens=300_000, mem_fraction_static=0.3) as engine:
        assert (random.random(), np.random.rand(), torch.rand(1)) == expected
        assert torch.get_num_threads() == threads
        assert engine.weight_version == 0

        # the cache of 300,000 tokens x 2 layers x 2 heads x 16 x 2 is 154 MB; release gives it back to the system
        # (its buffers are larger than anything that malloc keeps for itself)
        def resident() -> int:
            return psutil.Process().memory_info().rss

        pool = engine._scheduler.tp_worker.model_runner.token_to_kv_pool
        for layer in range(2):
            for buffer in pool.get_kv_buffer(layer):
                buffer.fill_(torch.nan)
        full = resident()
        engine.release()
        assert full - resident() > 140_000_000
        engine.resume()
        refit(engine, folders[0], 1)
        asked = request("r", prompt(1, 20))
        assert difference(Reference(folders[0]), asked, run(engine, [asked])["r"]) < TOLERANCE

    with pytest.raises(ValueError, match=r"tp_sise: SGLang has no such setting, did you mean tp_size\?; device: this"):
        SglangEngine(folders[0], dtype="float32", server_args={"tp_sise": 2, "device": "cuda"})
    with pytest.raises(ValueError, match="engines of 2 ranks do not divide a world of 1"):
        SglangEngine(folders[0], dtype="float32", server_args={"tp_size": 2})
    short = SglangEngine(folders[0], dtype="float32", context_length=30)
    with pytest.raises(ValueError, match=r"r: 20 prompt \+ 11 new tokens exceed the context of 30"):
        short.submit([request("r", prompt(0, 20), max_new_tokens=11)])
    refit(short, folders[0], 0)
    assert len(run(short, [request("r", prompt(0, 20), max_new_tokens=10, ignore_eos=True)])["r"].output_ids) == 10
    short.close()


def test_construction(ranks: Ranks, folders: list[Path]) -> None:
    ranks.run(1, construction, folders)


def test_bfloat16(ranks: Ranks, folders: list[Path]) -> None:
    ranks.run(1, bfloat16, folders)


def bfloat16(folders: list[Path]) -> None:
    from miles_spmd.generation.sglang.engine import SglangEngine

    engine = SglangEngine(folders[0], dtype="bfloat16")
    assert {tensor.dtype for tensor in engine.weights().values()} == {torch.bfloat16}
    refit(engine, folders[0], 0)
    asked = [request(f"r{i}", prompt(i, 10 + i), seed=i, stop_token_ids=[EOS]) for i in range(8)]
    outputs = run(engine, asked)
    engine.close()
    reference = Reference(folders[0])
    assert max(difference(reference, one, outputs[one.rid]) for one in asked) < 0.5
    assert any(difference(reference, one, outputs[one.rid]) > 1e-3 for one in asked)


def shared(folders: list[Path], server_args: dict[str, Any]) -> tuple[dict[str, int], dict[str, Output]]:
    """Two groups of four samples whose prompts share 40 tokens and then 40 more within a group, at the same moment, and
    one other request: what each found in the cache."""
    asked = [
        request(f"{g}.{i}", prompt(0, 40) + prompt(1 + g, 40), seed=10 * g + i, ignore_eos=True, max_new_tokens=4)
        for i in range(4)
        for g in range(2)
    ]
    asked.append(request("2.0", prompt(9, 60), ignore_eos=True, max_new_tokens=4))
    with engine_of("sglang", folders[0], **server_args) as engine:
        engine.submit(asked)
        outputs = {}
        while not engine.idle:
            outputs |= {output.rid: output for output in engine.step()}
        alone = {}
        for one in asked:
            engine.flush()
            alone |= run(engine, [one])
    cached = {rid: output.cached_tokens for rid, output in outputs.items()}
    assert {rid: msgspec.structs.replace(output, cached_tokens=0) for rid, output in outputs.items()} == alone
    return cached, alone


@pytest.mark.parametrize(
    ("server_args", "expected"),
    [
        ({}, {"0.0": 0, "1.0": 40, "2.0": 0} | {f"{g}.{i}": 79 for g in range(2) for i in range(1, 4)}),
        ({"disable_radix_cache": True}, {"2.0": 0} | {f"{g}.{i}": 0 for g in range(2) for i in range(4)}),
    ],
)
def test_what_requests_have_in_common_is_prefilled_once(
    ranks: Ranks, folders: list[Path], server_args: dict[str, Any], expected: dict[str, int]
) -> None:
    """Also where they arrive at the same moment; and their responses are those that they have alone."""
    ((cached, _),) = ranks.run(1, shared, folders, server_args)
    assert cached == expected


def held_back() -> list[list[str]]:
    """Who is held back in each step of an engine whose batches overlap: a prefill is cached one step behind its own."""
    from array import array
    from types import SimpleNamespace

    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    from miles_spmd.generation.sglang.shared_prefills import SharedPrefills

    cache = RadixCache.create_simulated()
    shared, steps = SharedPrefills(cache, 1, lasts=1), list[list[str]]()

    def of(rid: str, tokens: list[int]) -> Any:
        return SimpleNamespace(rid=rid, origin_input_ids=array("q", tokens), output_ids=array("q"))

    def step(waiting: list[Any], chunked: Any = None) -> None:
        shared.step()
        steps.append(sorted(shared.held(waiting, chunked)))

    def prefilled(one: Any, count: int) -> None:
        tokens = one.origin_input_ids[:count]
        cache.insert(InsertParams(key=RadixKey(token_ids=tokens), value=torch.empty(count, dtype=torch.bool)))

    a, b, c = (of(rid, prompt(0, 100)) for rid in "abc")
    other, short = of("other", prompt(1, 100)), of("short", prompt(0, 32))
    step([a, b, other, short, c])
    step([b, c])  # the first is still under way, as are the others
    prefilled(a, 100)
    step([b, c])
    step([b, c])  # both wait for room in the cache
    d, e = (of(rid, prompt(2, 100)) for rid in "de")
    step([d, e])
    step([e], chunked=d)
    prefilled(d, 50)
    step([e], chunked=d)  # the second part is under way
    prefilled(d, 100)
    step([e])
    f, g = (of(rid, prompt(3, 100)) for rid in "fg")
    step([f, g])
    step([f, g])  # there was no room for the first
    step([g])
    return steps


def test_who_is_held_back_where_batches_overlap(ranks: Ranks) -> None:
    (steps,) = ranks.run(1, held_back)
    assert steps == [["b", "c"], ["b", "c"], [], [], ["e"], ["e"], ["e"], [], ["g"], ["g"], ["g"]]
