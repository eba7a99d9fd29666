"""What every engine must do, as functions that run on each rank of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoTokenizer

from miles_spmd.generation.engine import Engine
from miles_spmd.models import load_family
from miles_spmd.training.log_probs import Distribution, linear_log_probs
from miles_spmd.training.output_layer import OutputLayer
from miles_spmd.types.request import Begun, Output, Request, SamplingParams
from miles_spmd.types.trajectory import FinishReason
from miles_spmd.weights import hugging_face
from tests.generation.checkpoints import CONTEXT, EOS, Reference

TOLERANCE = 2e-5  # fp32 against float64


@contextmanager
def engine_of(kind: str, folder: Path, **server_args: Any) -> Iterator[Any]:
    """An engine with the weights of ``folder`` as version 0. Tests also look into SGLang's parts."""
    if kind == "torch":
        from tests.reference_engine import TorchEngine

        engine: Any = TorchEngine(folder, dtype="float32")
    else:
        from miles_spmd.generation.sglang.engine import SglangEngine

        engine = SglangEngine(folder, dtype="float32", server_args=server_args)
    try:
        refit(engine, folder, 0)
        yield engine
    finally:
        if kind == "sglang":
            engine.close()


def refit(engine: Engine, folder: Path, version: int) -> None:
    hugging_face.load(folder, engine.weights(), engine.layout(), load_family(folder))
    engine.commit(version)


def request(
    rid: str, prompt: list[int], *, prompt_log_probs: bool = False, top1: bool = False, **sampling: Any
) -> Request:
    return Request(rid, prompt, SamplingParams(**({"max_new_tokens": 24} | sampling)), prompt_log_probs, top1)


def run(engine: Engine, requests: list[Request]) -> dict[str, Output]:
    engine.submit(requests)
    return finish(engine)


def finish(engine: Engine) -> dict[str, Output]:
    outputs = []
    while not engine.idle:
        outputs += engine.step()
    assert len({output.rid for output in outputs}) == len(outputs)
    # what an engine has cached depends on what it did before, and nothing else of an output does
    return {output.rid: msgspec.structs.replace(output, cached_tokens=0) for output in outputs}


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, EOS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def difference(reference: Reference, request: Request, output: Output) -> float:
    """How far an output's log-probs are from the reference's."""
    distribution = sampled_from(request)
    expected = reference.of_tokens(request.input_ids + output.output_ids, *astuple(distribution))
    return largest(expected[len(request.input_ids) - 1 :], output)


def difference_to_trainer(reference: Reference, request: Request, output: Output) -> float:
    """And from what the trainer's head makes of the reference's hidden states."""
    sequence, start = request.input_ids + output.output_ids, len(request.input_ids) - 1
    weight, distribution = reference.model.lm_head.weight, sampled_from(request)
    targets = torch.tensor(output.output_ids)
    hidden = reference.hidden(sequence)[start:]
    return largest(linear_log_probs(hidden, OutputLayer(weight, len(weight)), targets, distribution)[0], output)


def largest(expected: torch.Tensor, output: Output) -> float:
    assert len(output.output_ids) == len(output.output_log_probs)
    return float((expected - torch.tensor(output.output_log_probs, dtype=torch.float64)).abs().max())


def sampled_from(request: Request) -> Distribution:
    """A greedy request tells the log-probs of the whole vocabulary."""
    wanted = request.sampling
    if wanted.temperature == 0 or wanted.top_k == 1:
        return Distribution(wanted.temperature or 1.0)
    return Distribution(wanted.temperature, wanted.top_p, wanted.top_k)


# --- checks: (engine, folders) -> anything that must be the same on every rank ----------------------------------------


def log_probs(engine: Engine, folders: list[Path]) -> Any:
    """A token's log-prob is that of the distribution that it was drawn from."""
    reference = Reference(folders[0])
    ways = [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_p": 0.5},
        {"top_k": 3},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
        {"temperature": 0.0, "top_p": 0.5},
        {"temperature": 0.7, "top_k": 1},
    ]
    shared = prompt(0, 37)
    requests = []
    for number in range(28):
        text = shared + prompt(number, number % 5 + 1) if number % 2 else prompt(number, 1 + 4 * number)
        way = ways[number % len(ways)]
        prompt_too, top1 = number % 3 == 0, number % 2 == 0
        requests.append(request(f"r{number}", text, prompt_log_probs=prompt_too, top1=top1, seed=number, **way))
    outputs = run(engine, requests)
    for asked in requests:
        output = outputs[asked.rid]
        assert difference(reference, asked, output) < TOLERANCE, asked
        assert difference_to_trainer(reference, asked, output) < TOLERANCE, asked
        if asked.return_prompt_log_probs:
            assert output.prompt_log_probs is not None
            expected = reference.of_tokens(asked.input_ids)
            assert len(output.prompt_log_probs) == len(asked.input_ids) - 1
            torch.testing.assert_close(torch.tensor(output.prompt_log_probs).double(), expected, atol=TOLERANCE, rtol=0)
        else:
            assert output.prompt_log_probs is None
        if asked.return_top1:
            expected = reference.log_probs(asked.input_ids + output.output_ids)[len(asked.input_ids) - 1 :]
            assert output.top1_ids == expected.argmax(-1).tolist()
        else:
            assert output.top1_ids is None
    return outputs


def truncation(engine: Engine, folders: list[Path]) -> Any:
    """Nothing outside of top-k and top-p is ever drawn, greedy takes the likeliest, and what is inside does come."""
    reference = Reference(folders[0])
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.8},
    ]
    requests = [
        request(f"{w}-{i}", prompt(i, 9), seed=i, ignore_eos=True, **way)
        for w, way in enumerate(ways)
        for i in range(6)
    ]
    outputs = run(engine, requests)
    for w, way in enumerate(ways):
        ranks_drawn = set()
        for asked in requests[6 * w : 6 * w + 6]:
            ids = outputs[asked.rid].output_ids
            rows = reference.log_probs(asked.input_ids + ids, way.get("temperature") or 1.0)[len(asked.input_ids) - 1 :]
            for row, token in zip(rows.exp(), ids):
                better = row > row[token] + 1e-6
                assert better.sum() < way.get("top_k", math.inf if way.get("temperature", 1.0) else 1)
                assert row[better].sum() < way.get("top_p", 1.0) + 1e-6
                ranks_drawn.add(int(better.sum()))
        assert len(ranks_drawn) == (1 if w == 0 else 3 if w == 1 else len(ranks_drawn))
        assert w == 0 or len(ranks_drawn) >= 3
    return outputs


def stopping(engine: Engine, folders: list[Path]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    text = prompt(3, 8)
    free = run(engine, [request("free", text, seed=5, ignore_eos=True, max_new_tokens=60)])["free"].output_ids
    assert len(free) == 60  # SGLang hands tokens out in pieces of 50
    letters = tokenizer.decode(free)
    assert len(letters) == 60
    at = 20
    outputs = run(
        engine,
        [
            request("token", text, seed=5, max_new_tokens=60, stop_token_ids=[free[at]]),
            request("string", text, seed=5, max_new_tokens=60, stop=["no such", letters[at - 1 : at + 2]]),
            request("both ignored", text, seed=5, max_new_tokens=60, stop_token_ids=[free[at]], ignore_eos=True),
            request("length", text, seed=5, max_new_tokens=7, ignore_eos=True),
            request("one", text, seed=5, max_new_tokens=1, ignore_eos=True),
            request("context", prompt(4, CONTEXT - 3), max_new_tokens=3, ignore_eos=True),
        ],
    )
    first = free.index(free[at]) + 1
    assert outputs["token"].output_ids == free[:first]
    assert outputs["token"].finish_reason == FinishReason.STOP
    string = letters.index(letters[at - 1 : at + 2]) + 3
    assert outputs["string"].output_ids == free[:string]
    assert outputs["string"].finish_reason == FinishReason.STOP
    assert len(outputs["string"].output_log_probs) == string
    assert outputs["both ignored"].output_ids == free
    assert outputs["both ignored"].finish_reason == FinishReason.LENGTH
    assert outputs["length"].output_ids == free[:7]
    assert outputs["one"].output_ids == free[:1]
    assert len(outputs["context"].output_ids) == 3
    return outputs


def end_of_sequence(engine: Engine, folders: list[Path]) -> Any:
    """Sampling meets the end-of-sequence token often enough to see that it stops an answer, and is part of it."""
    many = {f"r{i}": request(f"r{i}", prompt(i, 5), seed=i, max_new_tokens=100, temperature=1.5) for i in range(16)}
    outputs = run(engine, list(many.values()))
    stopped = [output for output in outputs.values() if output.finish_reason == FinishReason.STOP]
    assert stopped
    assert all(output.output_ids[-1] == EOS and EOS not in output.output_ids[:-1] for output in stopped)
    going_on = request("on", many[stopped[0].rid].input_ids, seed=int(stopped[0].rid[1:]), max_new_tokens=100)
    sampling = {"temperature": 1.5, "ignore_eos": True, "seed": going_on.sampling.seed, "max_new_tokens": 100}
    longer = run(engine, [request("on", going_on.input_ids, **sampling)])["on"]
    assert longer.output_ids[: len(stopped[0].output_ids)] == stopped[0].output_ids
    assert len(longer.output_ids) == 100
    return outputs


def refusals(engine: Engine, folders: list[Path]) -> Any:
    if engine.leader:
        good = {"max_new_tokens": 4}
        for bad, words in [
            (request("long", prompt(0, CONTEXT - 3), max_new_tokens=4), f"long: .*exceed the context of {CONTEXT}"),
            (request("empty", [], **good), "empty: needs at least one token"),
            (request("silent", [1], max_new_tokens=0), "silent: needs at least one token"),
            (request("cold", [1], temperature=-1.0), "cold: temperature -1.0"),
            (request("p", [1], top_p=0.0), "p: top_p 0.0"),
            (request("k", [1], top_k=0), "k: top_k 0"),
            (request("fine", [1]), "fine: another request"),
        ]:
            with pytest.raises(ValueError, match=words):
                engine.submit([request("fine", [1]), bad])
    assert engine.idle
    engine.submit([request("busy", [1, 2], max_new_tokens=4, ignore_eos=True)])
    if engine.leader:
        with pytest.raises(ValueError, match="busy: another request"):
            engine.submit([request("busy", [1])])
    with pytest.raises(RuntimeError, match="idle"):
        engine.release()
    with pytest.raises(RuntimeError, match="idle"):
        engine.flush()
    outputs = finish(engine)
    assert list(outputs) == ["busy"]
    again = run(engine, [request("busy", [1, 2], ignore_eos=True)])  # a rid may come back once it is gone
    return outputs | again


def aborting(engine: Engine, folders: list[Path]) -> Any:
    reference = Reference(folders[0])
    asked = {
        rid: request(rid, prompt(len(rid), 6), ignore_eos=True, max_new_tokens=40) for rid in ("a", "a1", "b", "c")
    }
    engine.submit(list(asked.values()))
    outputs = [output for _ in range(5) for output in engine.step()]
    assert outputs == []
    engine.abort(["a", "unknown"])
    engine.submit([request("queued", prompt(1, 5), ignore_eos=True)])
    engine.abort(["queued"])
    stopped: dict[str, Output] = {}
    while len(stopped) < 2:
        stopped |= {output.rid: output for output in engine.step()}
    assert set(stopped) == {"a", "queued"}
    assert {output.finish_reason for output in stopped.values()} == {FinishReason.ABORT}
    assert stopped["queued"].output_ids == stopped["queued"].weight_versions == []
    assert 4 <= len(stopped["a"].output_ids) <= 7
    assert difference(reference, asked["a"], stopped["a"]) < TOLERANCE
    engine.step()
    engine.abort()
    rest = finish(engine)
    assert set(rest) == {"a1", "b", "c"}
    assert all(output.finish_reason == FinishReason.ABORT and output.output_ids for output in rest.values())
    free = run(engine, [asked["b"]])["b"]
    assert free.output_ids[: len(rest["b"].output_ids)] == rest["b"].output_ids
    return stopped | rest


def continuing(engine: Engine, folders: list[Path]) -> Any:
    """A request that was aborted goes on from its tokens as if it had never stopped: bitwise where operators are
    batch-invariant, as they are on a CPU. Its batch mates have begun elsewhere, or nowhere."""
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_k": 5}, {"temperature": 0.0}]
    asked = [
        request(f"r{i}", prompt(i % 4, 5 + 7 * (i % 4)), seed=i, top1=i % 2 == 0, ignore_eos=True, **ways[i % 3])
        for i in range(12)
    ]
    whole = run(engine, asked)
    stop = request("stop", prompt(3, 8), seed=5, ignore_eos=True)
    letters = AutoTokenizer.from_pretrained(folders[0]).decode(run(engine, [stop])["stop"].output_ids)
    stop = msgspec.structs.replace(stop, sampling=msgspec.structs.replace(stop.sampling, stop=[letters[8:11]]))
    whole |= run(engine, [stop])
    asked.append(stop)
    engine.flush()
    engine.submit(asked)
    for _ in range(9):  # a stop string is then begun and not complete
        engine.step()
    engine.abort()
    parts = finish(engine)
    assert {len(part.output_ids) for part in parts.values()} & {8, 9, 10}
    again = []
    for number, one in enumerate(asked):
        part = parts[one.rid]
        if number % 4 != 3:
            begun = Begun(part.output_ids, part.output_log_probs, part.top1_ids)
            one = msgspec.structs.replace(one, begun=begun)
        again.append(one)
    engine.flush()
    continued = run(engine, again)
    for rid, output in whole.items():
        assert continued[rid] == output
    if engine.leader:
        with pytest.raises(ValueError, match="full: continues 2 tokens with 2 log-probs, and has room for 2"):
            engine.submit(
                [msgspec.structs.replace(request("full", [1], max_new_tokens=2), begun=Begun([1, 2], [0, 0]))]
            )
    return continued


def seeds(engine: Engine, folders: list[Path]) -> Any:
    """A draw depends on its request alone: not on batch mates, their sampling, their order, or the prefix cache."""
    asked = [request(f"r{i}", prompt(i % 3, 11), seed=i % 7, ignore_eos=True, temperature=1.2) for i in range(21)]
    together = run(engine, asked)
    for one in (asked[4], asked[17]):
        alone = run(engine, [one])[one.rid]
        assert alone.output_ids == together[one.rid].output_ids
        assert alone.output_log_probs == together[one.rid].output_log_probs  # to the bit
    engine.flush()
    mates = [request(f"m{i}", prompt(50 + i, 3 + 9 * i), seed=i, top_k=5, top_p=0.5) for i in range(7)]
    mixed = run(engine, [*mates, *reversed(asked[:8]), request("greedy", [5], temperature=0.0)])
    assert all(mixed[one.rid].output_ids == together[one.rid].output_ids for one in asked[:8])
    answers = {one.sampling.seed: together[one.rid].output_ids for one in asked if one.input_ids == asked[0].input_ids}
    assert len({tuple(ids) for ids in answers.values()}) == len(answers) == 7
    return together


def versions(engine: Engine, folders: list[Path]) -> Any:
    """A refit in the middle of an answer: two spans, each with the log-probs of its own weights."""
    old, new = Reference(folders[0]), Reference(folders[1])
    assert engine.weight_version == 0
    asked = request("across", prompt(2, 9), ignore_eos=True, prompt_log_probs=True)
    engine.submit([asked, request("short", prompt(2, 9), ignore_eos=True, max_new_tokens=3)])
    outputs = [output for _ in range(8) for output in engine.step()]
    assert [output.weight_versions for output in outputs] == [[(0, 3)]]
    engine.pause()
    assert engine.step() == []
    assert not engine.idle
    refit(engine, folders[1], 7)
    assert engine.weight_version == 7
    engine.unpause()
    engine.submit([request("late", prompt(2, 9), ignore_eos=True)])
    done = finish(engine)
    (first, before), (second, after) = done["across"].weight_versions
    assert (first, second) == (0, 7)
    assert before == 8
    assert before + after == 24
    sequence, start = asked.input_ids + done["across"].output_ids, len(asked.input_ids) - 1
    got = torch.tensor(done["across"].output_log_probs).double()
    expected = torch.cat([old.of_tokens(sequence)[start : start + before], new.of_tokens(sequence)[start + before :]])
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    prompt_log_probs = torch.tensor(done["across"].prompt_log_probs).double()
    torch.testing.assert_close(prompt_log_probs, old.of_tokens(asked.input_ids), atol=TOLERANCE, rtol=0)
    assert done["late"].weight_versions == [(7, 24)]
    assert difference(new, request("late", asked.input_ids), done["late"]) < TOLERANCE
    return done


def refitting(engine: Engine, folders: list[Path]) -> Any:
    """New weights serve a prompt that was cached under the old ones; the old weights give the old answer again."""
    asked = request("r", prompt(6, 50), ignore_eos=True, seed=3)
    before = run(engine, [asked])["r"]
    refit(engine, folders[1], 1)
    between = run(engine, [asked])["r"]
    assert difference(Reference(folders[1]), asked, between) < TOLERANCE
    assert between.weight_versions == [(1, 24)]
    refit(engine, folders[0], 2)
    after = run(engine, [asked])["r"]
    assert (after.output_ids, after.output_log_probs) == (before.output_ids, before.output_log_probs)
    return [before, between]


def memory(engine: Engine, folders: list[Path]) -> Any:
    """Released weights occupy nothing, are the same tensors afterwards, and the old answer comes again."""
    asked = [request(f"r{i}", prompt(i, 30), ignore_eos=True, seed=i) for i in range(4)]
    before = run(engine, asked)
    weights = engine.weights()
    sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in weights.items()}
    assert min(sizes.values()) > 0
    for in_two_steps in (True, False):
        engine.release()
        assert {tensor.untyped_storage().nbytes() for tensor in weights.values()} == {0}
        for impossible in (engine.step, engine.release):
            with pytest.raises(RuntimeError, match="resume"):
                impossible()
        if in_two_steps:
            engine.resume_weights()
        else:
            engine.resume()
        assert {name: tensor.untyped_storage().nbytes() for name, tensor in weights.items()} == sizes
        for name, tensor in engine.weights().items():
            assert tensor.data_ptr() == weights[name].data_ptr()
            tensor.fill_(math.nan)
        refit(engine, folders[0], 0)
        engine.resume()  # the rest, if there is any
        assert run(engine, asked) == before
    engine.release(keep_weights=True)
    with pytest.raises(RuntimeError, match="resume"):
        engine.step()
    engine.resume_weights()  # nothing to take
    engine.resume()
    assert run(engine, asked) == before
    return before


def not_finite(engine: Engine, folders: list[Path]) -> Any:
    next(iter(engine.weights().values())).fill_(math.nan)
    engine.commit(3)
    engine.submit([request("broken", [1, 2, 3], max_new_tokens=2)])
    with pytest.raises(FloatingPointError, match=r"broken: .*weight version 3"):
        finish(engine)


CHECKS: list[Callable[[Engine, list[Path]], Any]] = [
    log_probs,
    truncation,
    stopping,
    end_of_sequence,
    refusals,
    aborting,
    continuing,
    seeds,
    refitting,
    memory,
    versions,
    not_finite,  # the engine is of no use after it
]


def check(kind: str, tp_size: int, folders: list[Path]) -> dict[str, Any]:
    """Return what all checks do, by name. They share an engine: whatever it did before, it has the first weights and
    an empty cache when a check begins."""
    server_args, found = {"tp_size": tp_size} if kind == "sglang" else {}, dict[str, Any]()
    with engine_of(kind, folders[0], **server_args) as engine:
        for one in CHECKS:
            refit(engine, folders[0], 0)
            engine.flush()
            found[one.__name__] = one(engine, folders)
    return found
