"""Each example of docs/plugins.md by itself: what it computes, through the part of the run that calls it."""

from __future__ import annotations

import asyncio
import json
import math
import re
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
from miles_spmd.config import AlgorithmConfig, Config, RewardConfig
from miles_spmd.config.table import walk
from miles_spmd.controller.generation.leaves import chosen
from miles_spmd.controller.inputs import PROTOCOLS
from miles_spmd.controller.journal.metrics import users_eval_metrics
from miles_spmd.controller.learning.micro_batches import pack_by
from miles_spmd.data.dataset import read_rows
from miles_spmd.data.source import PromptSource
from miles_spmd.environments.tools import tools
from miles_spmd.plugins.environment import Leaf
from miles_spmd.plugins.reward import Score
from miles_spmd.rewards.pool import RewardPool
from miles_spmd.telemetry.trackers import UsersTracker
from miles_spmd.types.rollout_batch import RolloutBatch
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.token_batch import TokenBatch
from miles_spmd.types.trajectory import FinishReason, Trajectory
from tests.environments.families import FAMILIES, write_family
from tests.environments.scripted import ScriptedContext, Turn, to_prompt
from tests.plugins.examples import EXAMPLES, PAGE
from tests.samples import sample_of
from tests.services.server import serving

pytestmark = pytest.mark.usefixtures("modules")


def settings(title: str, table: str) -> dict[str, Any]:
    return EXAMPLES[title].settings[table]


def samples(*rewards: float, uid: str = "p:1") -> list[Sample]:
    group = [sample_of(Prompt(uid, "", [1, 2]), i, [5], [-0.5], text=str(r)) for i, r in enumerate(rewards)]
    for sample, reward in zip(group, rewards):
        sample.reward = reward
    return group


def test_the_table_has_every_plug_point_and_every_section() -> None:
    rows = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \| `([\w.]+)`(.*?) \|", PAGE, re.MULTILINE)
    assert [title for title, *_ in rows] == list(EXAMPLES)
    assert all(anchor == title.lower().replace(" ", "-") for title, anchor, *_ in rows)
    named = {setting for *_, setting, rest in rows if not rest}
    assert named == {*PROTOCOLS, "data.prompt_data", "environment.environment", "reward.rm_type"}
    for title, _, setting, rest in rows:
        table, _, name = setting.partition(".")
        assert rest or EXAMPLES[title].function in str(settings(title, table)[name])
    known = {setting.dotted for setting in walk(Config)}
    for title, example in EXAMPLES.items():
        for table, of_table in example.settings.items():
            assert {f"{table}.{name}" for name in of_table} <= known, title


# --- data and rollouts -----------------------------------------------------------------------------------------------


def test_rows() -> None:
    rows = list(read_rows("my_rows:sums@[9:11]", []))
    assert rows == [
        (10, {"prompt": "1 plus 1 is ", "label": "2", "size": 2}),
        (11, {"prompt": "1 plus 2 is ", "label": "3", "size": 3}),
    ]
    assert len(list(read_rows("my_rows:sums", []))) == 64
    assert [number for number, _ in read_rows("my_rows:sums@[-2:]", [])] == [63, 64]


def test_curriculum() -> None:
    items = [Prompt(f"p:{size}", "", [1], None, {"size": size}) for size in (3, 1, 2)]
    source = PromptSource(items, 7, curriculum="my_curriculum:easy_first")
    assert [item.uid for item in source.of_step(0, 3)] == ["p:1", "p:2", "p:3"]
    later = [item.uid for item in source.at(3, 30)]
    assert later == [item.uid for item in PromptSource(items, 7, curriculum="my_curriculum:easy_first").at(3, 30)]
    epochs = [[uid.partition("#")[0] for uid in later[start : start + 3]] for start in range(0, 30, 3)]
    assert all(sorted(epoch) == ["p:1", "p:2", "p:3"] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_trained_leaves() -> None:
    name = settings("Trained leaves", "environment")["trained_leaves"]
    reasons = [FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP]
    leaves = [Leaf(Trajectory([1], finish_reason=reason), order) for order, reason in enumerate(reasons)]
    assert chosen(name, leaves) == {0, 2}
    assert chosen(name, [leaves[1]] * 2) == {0, 1}


def test_tool_and_format_of_calls(tmp_path: Path) -> None:
    tokenizer = write_family(tmp_path, FAMILIES["qwen"])
    question = to_prompt(tokenizer, [{"role": "user", "content": "What is 1 plus 2?"}])

    def converse(title: str, said: list[str]) -> list[str]:
        context = ScriptedContext(tokenizer, [Turn(tokenizer.encode(f"{text}<|im_end|>")) for text in said])
        trajectory = asyncio.run(tools(context, question, **settings(title, "environment")["environment_kwargs"]))
        assert trajectory.text == "It is 3."
        return [message["content"] for message in trajectory.messages if message["role"] == "tool"]

    hermes = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2.0}}\n</tool_call>'
    assert converse("Tool", [hermes, "It is 3."]) == ["3"]
    lines = ['Let me see.\nCALL add {"a": 1, "b": 2}\nCALL add {"a": 1', 'CALL sum {"a": 1}', "It is 3."]
    found = converse("Format of calls", lines)
    assert found[0] == "3"
    assert "the call cannot be read, and no tool was called: its arguments are not valid JSON" in found[1]
    assert "the tool 'sum' does not exist" in found[2]


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_reply_of_a_judge() -> None:
    replies = ["[x] correct [ ] short [x] polite [x] kind", "I do not know.", "[ ] correct [ ] short"]

    def reply(body: Any, number: int) -> Any:
        return {"choices": [{"message": {"role": "assistant", "content": replies[number]}}]}

    with serving(reply) as server:
        given = settings("Reply of a judge", "reward") | {"judge_url": server.url, "reward_workers": 1}
        with RewardPool(RewardConfig(**given, service_requests=1)) as pool:
            found = pool.submit(samples(0.0, 0.0)).result(timeout=60)
    assert found == [Score(0.75, {"boxes": 4.0}), Score(0.0, {"boxes": 2.0})]


def test_rewards_of_a_rollout() -> None:
    algorithm = AlgorithmConfig(**settings("Rewards of a rollout", "algorithm"))
    batch = samples(1.0, 100.0, 1.0, -3.0) + samples(2.0, 2.0, uid="p:2")
    assert shape_rewards(batch, algorithm, 10).tolist() == [0.5, 0.875, 0.5, 0.125, 0.5, 0.5]


def test_filters() -> None:
    of_groups = settings("Filter of groups", "algorithm")["dynamic_sampling_filter"]
    assert [keeps_group(of_groups, samples(0.5, one)) for one in (0.5, 0.5005, 0.6)] == [False, False, True]
    of_samples = settings("Filter of samples", "algorithm")["sample_filter"]
    batch = samples(0.2, 0.9, 0.1, 0.3) + samples(1.0, uid="p:2")
    assert kept_samples(of_samples, batch) == [False, True, True, False, True]


# --- training --------------------------------------------------------------------------------------------------------


def algorithm_of(*titles: str) -> AlgorithmConfig:
    return AlgorithmConfig(**{name: value for title in titles for name, value in settings(title, "algorithm").items()})


def test_advantage_and_correction() -> None:
    masks = [np.asarray(mask, np.float32) for mask in ([0, 1, 1], [0, 1], [0, 1], [0, 0, 1])]
    engine = [np.asarray(values, np.float32) for values in ([0, -1, -8], [0, -7], [0, -6.8], [0, 0, -2])]
    batch = RolloutBatch(
        rewards=np.asarray([1.0, 0.0, 0.5, 0.5]),
        group_ids=np.asarray([0, 0, 1, 1]),
        masks=masks,
        old_log_probs=engine,
        rollout_log_probs=engine,
    )
    users = algorithm_of("Advantage", "Correction")
    estimate = compute_advantages(batch, users)
    assert [a.tolist() for a in estimate.advantages] == [[0, 1, 1], [0, 0], [0, 1], [0, 0, 1]]
    assert estimate.metrics["best_responses"] == 0.75
    correction = correct(batch, users)
    assert correction is not None
    assert [w.tolist() for w in correction.policy_weights] == [[0, 1, 0], [0, 0], [0, 1], [0, 0, 1]]
    assert correction.metrics["kept_tokens"] == 3


def test_policy_term_of_the_loss() -> None:
    advantages, old, new = [2.0, -1.0, 2.0], [-1.0, -1.0, -1.0], [-0.5, -0.5, -1.0]
    log_probs = torch.tensor(new, requires_grad=True)
    tokens = TokenBatch(torch.ones(3), advantages=torch.tensor(advantages), old_log_probs=torch.tensor(old))
    loss, sums = PolicyLoss(algorithm_of("Policy term of the loss"))(log_probs, torch.zeros(3), tokens)

    def term(a: float, log_pi: float, log_old: float) -> float:
        tau = 1.0 if a > 0 else 1.05
        return -a * 4 / tau / (1 + math.exp(-tau * (math.exp(log_pi - log_old) - 1)))

    assert loss.tolist() == pytest.approx([term(*values) for values in zip(advantages, new, old)], rel=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    step = 1e-5
    slopes = [(term(a, n + step, o) - term(a, n - step, o)) / (2 * step) for a, n, o in zip(advantages, new, old)]
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-5)
    assert gradient[2].item() == pytest.approx(-2.0)  # where nothing has changed it is the policy gradient
    assert sums["pg_clipfrac"] == 0


def test_aggregation() -> None:
    masks = [np.asarray(mask, np.float32) for mask in ([0, 1], [1, 1, 1, 1, 0], [0, 0])]
    kind = settings("Aggregation", "algorithm")["loss_aggregation"]
    weights = loss_weights(masks, kind, max_response_len=8)
    assert [w.sum() for w in weights] == pytest.approx([1 / 4, 2 / 4, 0])  # roots of 1, 4 and, for an empty one, 1


def test_packing() -> None:
    name = settings("Packing", "train")["packing"]
    packing = pack_by(name, [5, 5, 3, 9, 2], data_parallel_size=2, max_tokens=10, multiple=1)
    assert packing == [[[0, 1], [3]], [[2], [4]]]
    assert pack_by(name, [5], data_parallel_size=2, max_tokens=10, multiple=2) == [[[0], [-1]], [[-1], [-1]]]


# --- the run ---------------------------------------------------------------------------------------------------------


def test_evaluator() -> None:
    groups = [samples(1.0, 1.0, 0.0), samples(0.0, 0.5, 0.5, 1.0, uid="p:2")]
    found = users_eval_metrics(EXAMPLES["Evaluator"].function, {"sums": groups, "empty": []})
    assert found == {"eval/sums-majority": 0.5, "eval/sums-distinct": 2.5}


def test_tracker(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed forgets what came after the step from which it goes on."""
    monkeypatch.chdir(modules)
    config = Config.model_construct(run=Config.model_fields["run"].annotation(name="tiny"))  # type: ignore[misc]
    for logged, rewound in (([1, 2, 3], 0), ([2], 1)):
        tracker = UsersTracker(EXAMPLES["Tracker"].function, config)
        tracker.rewind(rewound)
        for step in logged:
            tracker.log(step, {"train/loss": step / 2})
        tracker.close()
    rows = (modules / "tiny.csv").read_text().splitlines()
    assert rows == ["1,train/loss,0.5", "2,train/loss,1.0"]


def test_hook_of_the_phases_writes_what_it_is_given(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles_spmd.controller.journal import events
    from miles_spmd.controller.journal.hooks import Hook

    monkeypatch.chdir(modules)
    hook = Hook(EXAMPLES["Hook of the phases"].function)
    hook.observe(events.PhaseStarted("rollout", 3))
    hook.observe(events.PhaseFinished("rollout", 0.5))
    hook.observe(events.RolloutFinished(3, [samples(1.0)], 0))
    hook.observe(events.PhaseStarted("log_probs", 3))
    hook.observe(events.PhaseStarted("ledger", 3))  # phases may lie within one another
    hook.observe(events.PhaseFinished("ledger", 0.5))
    hook.observe(events.PhaseFinished("log_probs", 0.5))
    (row,) = map(json.loads, (modules / "samples.jsonl").read_text().splitlines())
    assert row == {"step": 3, "uid": "p:1", "text": "1.0", "reward": 1.0}
