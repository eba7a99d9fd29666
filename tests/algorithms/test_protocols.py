"""The one mechanism behind all plug points, and a user's own policy loss through it."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from miles_spmd.algorithms.advantages import ESTIMATORS
from miles_spmd.algorithms.aggregation import AGGREGATIONS
from miles_spmd.algorithms.corrections import CORRECTIONS
from miles_spmd.algorithms.distillation import STRATEGIES, WEIGHT_MODES
from miles_spmd.algorithms.kl import KINDS
from miles_spmd.algorithms.losses import SURROGATES, PolicyLoss
from miles_spmd.algorithms.rewards import GROUP_FILTERS, REWARD_POST_PROCESSES
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.plug_point import PlugInError, PlugPoint, PlugPointError
from miles_spmd.types.token_batch import TokenBatch

PLUG_POINTS = [ESTIMATORS, AGGREGATIONS, CORRECTIONS, SURROGATES, GROUP_FILTERS, REWARD_POST_PROCESSES]


class Holder:
    @staticmethod
    def triple(x: int) -> int:
        return 3 * x


NOT_CALLABLE = 3


def test_names_and_paths() -> None:
    point = PlugPoint("algorithm.loss_type", {"double": lambda x: 2 * x})
    assert point.resolve("double")(2) == 4
    assert point.resolve(f"{__name__}:Holder.triple")(2) == 6


def exits() -> None:
    sys.exit(2)


def raises() -> None:
    raise KeyError("no such thing")


def hangs() -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("exits", r"called sys\.exit\(2\)"),
        ("raises", "raised KeyError: 'no such thing'"),
        ("hangs", r"took longer than deadlines\.train_timeout = 0\.2 s"),
    ],
)
def test_a_users_function_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, name: str, problem: str) -> None:
    monkeypatch.setattr(PlugPoint, "time_limit", 0.2)
    function = PlugPoint("algorithm.loss_type", {}).resolve(f"{__name__}:{name}")
    with pytest.raises(PlugInError, match=f"algorithm.loss_type = '{__name__}:{name}' {problem}"):
        function()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "treble",
            r"algorithm.loss_type = 'treble' is unknown; known: double, or your own `module:function`",
        ),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{__name__}:nothing", "cannot be imported: AttributeError.*nothing"),
        (f"{__name__}:NOT_CALLABLE", "is of type int; it must be a function"),
    ],
)
def test_bad_names_say_what_to_do(name: str, message: str) -> None:
    with pytest.raises(PlugPointError, match=message):
        PlugPoint("algorithm.loss_type", {"double": lambda x: 2 * x}).resolve(name)


@pytest.mark.parametrize("point", PLUG_POINTS, ids=lambda p: p.setting)
def test_the_configuration_knows_the_same_names(point: PlugPoint) -> None:
    table, leaf = point.setting.split(".")
    assert table == "algorithm"
    for name in [*point.builtins, "anybodys:function"]:
        assert getattr(AlgorithmConfig(**{leaf: name}), leaf) == name
    with pytest.raises(ValidationError, match=f"{', '.join(point.builtins)}.*`module:function`"):
        AlgorithmConfig(**{leaf: "nobodys"})


def test_the_configurations_choices_are_the_functions() -> None:
    fields = AlgorithmConfig.model_fields
    assert get_args(fields["kl_loss_type"].annotation) == KINDS
    assert get_args(fields["opd_top_k_strategy"].annotation) == STRATEGIES
    assert get_args(fields["opd_reward_weight_mode"].annotation) == WEIGHT_MODES


def test_estimators_name_their_own_loss() -> None:
    assert {
        name: AlgorithmConfig(advantage_estimator=name).surrogate for name in ("grpo", "gspo", "cispo", "ppo", "a:b")
    } == {
        "grpo": "ppo",
        "gspo": "gspo",
        "cispo": "cispo",
        "ppo": "ppo",
        "a:b": "ppo",
    }
    assert AlgorithmConfig(advantage_estimator="gspo", loss_type="cispo").surrogate == "cispo"


def reinforce(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    return -log_probs * tokens.required("advantages"), torch.zeros_like(log_probs, dtype=torch.bool)


def scalar(log_probs: Tensor, tokens: TokenBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    return -log_probs.sum(), torch.zeros(())


def test_a_users_policy_term_gets_entropy_and_correction_around_it() -> None:
    algorithm = AlgorithmConfig(loss_type=f"{__name__}:reinforce", entropy_coef=0.5)
    tokens = TokenBatch(torch.ones(1), advantages=torch.tensor([2.0]), policy_weights=torch.tensor([0.5]))
    loss, sums = PolicyLoss(algorithm)(torch.tensor([-3.0]), torch.tensor([4.0]), tokens)
    assert loss.tolist() == [0.5 * 6 - 0.5 * 4]
    assert sums["pg_loss"] == 3
    with pytest.raises(ValueError, match=r"test_protocols:scalar' returned shape \[\], not \[1\]"):
        PolicyLoss(AlgorithmConfig(loss_type=f"{__name__}:scalar"))(torch.tensor([-3.0]), torch.zeros(1), tokens)
