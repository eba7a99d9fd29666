"""Functions that cannot be called, raise, or return something else: one error with setting and expectation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles_spmd.algorithms.advantages import compute_advantages
from miles_spmd.algorithms.aggregation import loss_weights
from miles_spmd.algorithms.corrections import correct
from miles_spmd.algorithms.losses import PolicyLoss
from miles_spmd.algorithms.rewards import keeps_group, kept_samples, shape_rewards
from miles_spmd.config import AlgorithmConfig, Config, RewardConfig, RolloutConfig
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.controller import inputs
from miles_spmd.controller.checkpoints import EXPORTERS
from miles_spmd.controller.generation.leaves import chosen
from miles_spmd.controller.generation.selection import selected
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.hooks import Hook
from miles_spmd.controller.journal.metrics import users_eval_metrics
from miles_spmd.controller.learning.micro_batches import pack_by
from miles_spmd.data.dataset import read_rows
from miles_spmd.data.source import PromptSource
from miles_spmd.environments.calls import CallParser
from miles_spmd.generation.engine import FACTORIES
from miles_spmd.plugins.environment import Leaf
from miles_spmd.rewards.judge import verdict
from miles_spmd.telemetry.trackers import UsersTracker
from miles_spmd.types.rollout_batch import RolloutBatch
from miles_spmd.types.sample import Prompt
from miles_spmd.types.token_batch import TokenBatch
from miles_spmd.worker.hook import TRAINER_HOOKS
from tests.samples import sample_of
from tests.worker.tiny_run import write_checkpoint, write_config

WRONG = """
def narrow():
    return None

async def waits(*given, **named):
    return None

def raises(*given, **named):
    raise KeyError("gone")

def nothing(*given, **named):
    return None

def yields(*given):
    yield {"prompt": "a"}
    raise KeyError("gone")
"""


@pytest.fixture(autouse=True)
def _wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_plugins.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)


def test_signatures_are_examined_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, write_checkpoint(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)

    def found(function: str) -> list[str]:
        overrides = [f"{setting}=wrong_plugins:{function}" for setting in inputs.PROTOCOLS]
        overrides += ["data.prompt_data=wrong_plugins:raises", "rollout.over_sampling_batch_size=6"]
        with pytest.raises(ConfigError) as caught:
            load_config(config, overrides, inputs=partial(inputs.errors, task="train"))
        return caught.value.errors

    narrow = found("narrow")
    for setting, protocol in inputs.PROTOCOLS.items():
        (line,) = [line for line in narrow if line.startswith(f"{setting} = 'wrong_plugins:narrow' ")]
        assert "has the parameters (): too many positional arguments; it is called as (" in line
        assert line.endswith(f"see {protocol.__name__} in {protocol.__module__.replace('.', '/')}.py")
    (line,) = [line for line in narrow if line.startswith("data.prompt_data: ")]
    assert "data.prompt_data = 'wrong_plugins:raises' raised KeyError: 'gone'; fix the function, or name" in line
    assert len(narrow) == len(inputs.PROTOCOLS) + 1
    assert all("is an `async def`, which is not awaited here" in line for line in found("waits")[:-1])


def batch() -> RolloutBatch:
    ones = [np.ones(2, np.float32)] * 2
    return RolloutBatch(np.asarray([0.0, 1.0]), np.asarray([0, 0]), ones, old_log_probs=ones, rollout_log_probs=ones)


def acceptance(name: str) -> Any:
    rollout = RolloutConfig(acceptance=name, rollout_batch_size=1, over_sampling_batch_size=2)
    return selected(Config.model_construct(rollout=rollout, algorithm=AlgorithmConfig()), 0, [SAMPLES, SAMPLES])


SAMPLES = [sample_of(Prompt("p:1", "", [1]), index, [5], [-0.5]) for index in (0, 1)]
for one in SAMPLES:
    one.reward = 1.0
TOKENS = TokenBatch(torch.ones(1), advantages=torch.ones(1))
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
# Setting -> a call of the function that it names, as the run calls it, and what it must return; None: anything will do.
CALLS: Mapping[str, tuple[Callable[[str], Any], str | None]] = {
    "run.phase_hook": (lambda name: Hook(name).observe(events.PhaseStarted("rollout", 0)), None),
    "data.prompt_data": (lambda name: list(read_rows(name, [])), ""),
    "data.curriculum": (
        lambda name: PromptSource([Prompt("p:1", "", [1])], 0, curriculum=name).at(0, 1),
        "1 indices from 0 to 0, one for each item",
    ),
    "rollout.engine": (lambda name: FACTORIES.resolve(name)(Path(), dtype="", context_length=None), None),
    "rollout.acceptance": (acceptance, "1 different numbers from 0 to 1"),
    "environment.trained_leaves": (
        lambda name: chosen(name, [Leaf(sample.trajectory, 0) for sample in SAMPLES]),
        "at least one of the numbers from 0 to 1, each once",
    ),
    "algorithm.reward_post_process": (
        lambda name: shape_rewards(SAMPLES, AlgorithmConfig(reward_post_process=name), 8),
        "2 finite numbers, one for each sample",
    ),
    "algorithm.dynamic_sampling_filter": (
        lambda name: keeps_group(name, SAMPLES),
        "True for a group that is trained on, False for another",
    ),
    "algorithm.sample_filter": (lambda name: kept_samples(name, SAMPLES), "True or False for each of the 2 samples"),
    "algorithm.advantage_estimator": (
        lambda name: compute_advantages(batch(), AlgorithmConfig(advantage_estimator=name)),
        "an Estimate",
    ),
    "algorithm.loss_type": (
        lambda name: PolicyLoss(AlgorithmConfig(loss_type=name))(torch.zeros(1), torch.zeros(1), TOKENS),
        "a tuple of two tensors",
    ),
    "algorithm.loss_aggregation": (
        lambda name: loss_weights(batch().masks, name, max_response_len=8),
        "weights that are finite, shaped like the masks, and 0 where these are 0",
    ),
    "algorithm.tis_function": (
        lambda name: correct(batch(), AlgorithmConfig(use_tis=True, tis_function=name)),
        "a Correction",
    ),
    "reward.judge_reader": (lambda name: verdict(RewardConfig(judge_reader=name), "fine", 0), None),
    "train.packing": (
        lambda name: pack_by(name, [3, 4], data_parallel_size=1, max_tokens=8, multiple=1),
        "a packing (miles_spmd/plugins/training.py), and 1 ranks have the same number of micro-batches",
    ),
    "train.trainer_hook": (
        lambda name: TRAINER_HOOKS.resolve(name)("train", ends=True, role="actor", weights={}),
        None,
    ),
    "eval.evaluator": (
        lambda name: users_eval_metrics(name, {"set": [SAMPLES]}),
        "a dict with printable names and finite numbers",
    ),
    "checkpoint.exporter": (lambda name: EXPORTERS.resolve(name)(Path(), 1), None),
    "telemetry.tracker": (
        lambda name: UsersTracker(name, Config.model_construct()),
        "an object with the methods log, rewind and close",
    ),
    "environment.environment_kwargs: call_format": (
        lambda name: CallParser(name, TOOLS, "qwen3").parse("hi", "", 0),
        "a text, and a list with the name and the arguments of each call",
    ),
}


def test_every_plug_point_is_called_here() -> None:
    others = {"data.prompt_data", "environment.environment_kwargs: call_format"}
    assert {*CALLS} == {*inputs.PROTOCOLS} | others


@pytest.mark.parametrize("setting", CALLS)
def test_one_that_raises_is_named(setting: str) -> None:
    call, _ = CALLS[setting]
    with pytest.raises(Exception, match=r"raised KeyError: 'gone'") as caught:
        call("wrong_plugins:raises")
    assert f"{setting} = 'wrong_plugins:raises' " in str(caught.value)


@pytest.mark.parametrize("setting", CALLS)
def test_one_that_returns_nothing_is_told_what_to_return(setting: str) -> None:
    call, expected = CALLS[setting]
    if expected is None:
        call("wrong_plugins:nothing")
        return
    with pytest.raises(Exception, match="wrong_plugins:nothing") as caught:
        call("wrong_plugins:nothing")
    assert f"{setting} = 'wrong_plugins:nothing' " in str(caught.value)
    assert expected in str(caught.value)
    assert ("returned None; it must return" in str(caught.value)) == bool(expected)


def test_rows_that_end_with_an_error() -> None:
    with pytest.raises(Exception, match="wrong_plugins:yields' raised KeyError: 'gone'"):
        list(read_rows("wrong_plugins:yields", []))
    assert list(read_rows("wrong_plugins:yields@[0:1]", [])) == [(1, {"prompt": "a"})]


@pytest.mark.parametrize(
    ("packing", "problem"),
    [
        ([[[0, 1], [2]]], "2 ranks have the same number of micro-batches, a multiple of 1"),
        ([[[0, 1]], [[2], []]], "2 ranks have the same number of micro-batches"),
        ([[[0, 1]], [[1]]], "each index from 0 to 2 occurs once, and no micro-batch is empty"),
        ([[[0, 1, 2]], [[]]], "each index from 0 to 2 occurs once, and no micro-batch is empty"),
        ([[[0, 1, 2]], [[-1]]], "no micro-batch has more than 8 tokens (one has 12)"),
    ],
)
def test_a_packing_that_cannot_be_used(packing: Any, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import wrong_plugins  # type: ignore[import-not-found]

    monkeypatch.setattr(wrong_plugins, "nothing", lambda *_, **__: packing)
    with pytest.raises(Exception, match=r"train\.packing") as caught:
        pack_by("wrong_plugins:nothing", [3, 4, 5], data_parallel_size=2, max_tokens=8, multiple=1)
    assert problem in str(caught.value)
