"""Plug-ins that import names of ours from where they were one version ago."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from miles_spmd.algorithms.advantages import compute_advantages
from miles_spmd.algorithms.kl import kl_penalties
from miles_spmd.config import AlgorithmConfig
from miles_spmd.plugins.renamed import MODULES, NAMES
from miles_spmd.types.rollout_batch import RolloutBatch

PLUG_IN = """
from miles_spmd.algorithms.mismatch import mismatch_metrics
from miles_spmd.algorithms.preference import PreferenceLoss
from miles_spmd.algorithms.protocols import AdvantageEstimator, PlugPoint
from miles_spmd.algorithms.rollout_batch import Estimate, RolloutBatch, Rollouts
from miles_spmd.algorithms.token_batch import TokenBatch
from miles_spmd.config.schema import Algorithm, Fraction, Reward
from miles_spmd.data.preferences import PreferencePair
from miles_spmd.data.sample import Sample, TrainSequence
from miles_spmd.data.seeds import derive_seed
from miles_spmd.data.sft import SftExample, load_items
from miles_spmd.rewards.protocols import Score
from miles_spmd.rollout.engine import Engine, Request

def minus_kl(batch: RolloutBatch, algorithm: Algorithm) -> Estimate:
    return Estimate([-penalty for penalty in batch.kl_penalties(algorithm)])
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "old_plug_in.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "old_plug_in", raising=False)
    return tmp_path / "old_plug_in.py"


def test_old_names_work_and_warn_with_the_new_ones(plug_in: Path) -> None:
    algorithm = AlgorithmConfig(advantage_estimator="old_plug_in:minus_kl", kl_coef=0.5, kl_loss_type="k1")
    ones = [np.ones(2, np.float32)]
    batch = RolloutBatch(np.ones(1), np.zeros(1, int), ones, old_log_probs=[-1 * ones[0]], ref_log_probs=[-2 * ones[0]])
    with pytest.warns(DeprecationWarning, match="is now miles_spmd") as caught:
        estimate = compute_advantages(batch, algorithm)
    assert estimate.advantages[0].tolist() == (-kl_penalties(batch, algorithm)[0]).tolist() == [-0.5, -0.5]
    renamed = [w for w in caught if "is now miles_spmd." in str(w.message)]
    assert {w.filename for w in renamed} == {str(plug_in)}
    messages = [str(w.message) for w in renamed]
    assert len(messages) == 21
    for message in (
        "miles_spmd.algorithms.protocols.PlugPoint is now miles_spmd.plugins.plug_point.PlugPoint; the old name is",
        "miles_spmd.data.sample.TrainSequence is now miles_spmd.types.train_sequence.TrainSequence; ",
        "miles_spmd.algorithms.rollout_batch.Rollouts is now miles_spmd.types.rollout_batch.RolloutTable; ",
        "miles_spmd.data.sft.load_items is now miles_spmd.data.dataset.load_items; ",
        "miles_spmd.rollout.engine.Request is now miles_spmd.types.request.Request; ",
        "miles_spmd.config.schema.Reward is now miles_spmd.config.RewardConfig; ",
        "miles_spmd.config.schema.Algorithm is now miles_spmd.config.AlgorithmConfig; ",
        "RolloutBatch.kl_penalties(algorithm) is now miles_spmd.algorithms.kl.kl_penalties(batch, algorithm); ",
    ):
        assert any(m.startswith(message) for m in messages), message


def test_unknown_names_are_errors() -> None:
    importlib.import_module("miles_spmd.plugins.renamed").accept_old_names()
    with pytest.raises(ImportError, match="Nothing"):
        exec("from miles_spmd.data.sample import Nothing")
    with pytest.raises(ModuleNotFoundError, match=r"miles_spmd\.data\.nothing"):
        importlib.import_module("miles_spmd.data.nothing")


def test_new_names_exist() -> None:
    for new_modules in MODULES.values():
        for module in new_modules:
            importlib.import_module(module)
    for old, new_name in NAMES.items():
        old_module = old.rpartition(".")[0]
        assert any(
            new_name in vars(importlib.import_module(module)) for module in MODULES.get(old_module, (old_module,))
        )


def test_only_plug_ins_get_old_names(plug_in: Path) -> None:
    """And their users see the warnings without asking Python for them."""
    code = (
        "from miles_spmd.algorithms.advantages import ESTIMATORS\n"
        "try:\n"
        "    import miles_spmd.data.sample\n"
        "except (ModuleNotFoundError, FileNotFoundError):\n"
        "    print('not yet')\n"
        "print(ESTIMATORS.resolve('old_plug_in:minus_kl').__name__)\n"
    )
    path = os.pathsep.join([str(plug_in.parent), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=60
    )
    assert done.stdout.split("\n")[:2] == ["not yet", "minus_kl"], done.stderr
    assert f"{plug_in}:7: DeprecationWarning: miles_spmd.config.schema.Algorithm is now" in done.stderr


def test_looking_through_all_modules_imports_nothing() -> None:
    """As pydantic, jinja2 and others do to find where a class or function is from."""
    code = (
        "import inspect, sys\n"
        "from miles_spmd.plugins.renamed import accept_old_names\n"
        "accept_old_names()\n"
        "inspect.getmodule(sys._getframe())\n"
        "print([name for name in ('torch', 'miles_spmd.algorithms.losses') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
