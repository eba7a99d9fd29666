"""Labels that the built-in rewards cannot read."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from miles_spmd.config import RewardConfig
from miles_spmd.rewards.functions import BUILT_IN, SERVICES, load_reward
from miles_spmd.rewards.labels import check_label

READABLE: dict[str, list[Any]] = {
    "math": ["3", 3, 3.5, Decimal("3.50"), "1e-05", "x**2", r"\boxed{3}", "so 1 + 2 = 3\n#### 3", "blue", "{"],
    "exact": ["3", "", 3, 3.5, ["3", 4], ("a", "b")],
    "f1": ["Paris", "", ["Paris", 3]],
    "gpqa": ["A", "(b)", " C. ", 0, 3],
    "code": [
        {"inputs": ["1"], "outputs": ["2"]},
        {"inputs": [["1", "2"]], "outputs": [["3"]], "fn_name": None},
        {"inputs": [[1], []], "outputs": [None, {"a": 1}], "fn_name": "f"},
        '{"inputs": ["1"], "outputs": ["2"]}',
        ["assert f(1) == 2"],
        '["assert f(1) == 2", "f(2)"]',
        "def check(f):\n    assert f(1) == 2\ncheck(f)",
    ],
    "module:function": [None, {}, []],
}
UNREADABLE: dict[str, list[Any]] = {
    "math": [None, True, ["3"], {"answer": 3}, "", "  ", "####", "so 3 ####  ", float("nan"), float("inf"), b"3"],
    "exact": [None, [], [None], {"answer": 3}, [["3"]], True, ["a", False], b"3", float("nan"), [1.0, float("inf")]],
    "f1": [None, [], {"answer": "Paris"}],
    "gpqa": [None, True, "", "Paris", "AB", ["A"], -1, 26, 1.0],
    "code": [
        *(
            None,
            3,
            [],
            {},
            "",
            "# nothing",
            [""],
            [1],
            "assert f(",
            ["assert f(1) == 2", "assert"],
            '{"inputs": [',
            "null",
            "3",
        ),
        *({"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []}, {"inputs": "1", "outputs": "2"}),
        *({"inputs": [1], "outputs": ["2"]}, {"inputs": ["1"], "outputs": [2]}, {"inputs": ["1"]}),
        *({"inputs": [1], "outputs": [2], "fn_name": "f"}, {"inputs": [[1]], "outputs": [2], "fn_name": 3}),
    ],
}


@pytest.mark.parametrize(("rm_type", "label"), [(name, label) for name, some in READABLE.items() for label in some])
def test_readable(rm_type: str, label: Any) -> None:
    assert check_label(rm_type, label) is None


@pytest.mark.parametrize(("rm_type", "label"), [(name, label) for name, some in UNREADABLE.items() for label in some])
def test_unreadable(rm_type: str, label: Any) -> None:
    problem = check_label(rm_type, label)
    assert problem is not None
    assert problem.startswith("the label")


def test_every_built_in_reward_has_a_setting_and_labels() -> None:
    reads = set(BUILT_IN) - SERVICES.keys()  # what a service reads as a label is its own affair
    assert reads == READABLE.keys() - {"module:function"} == UNREADABLE.keys()
    for name in BUILT_IN:
        assert RewardConfig(rm_type=name).terms[0].name == name
    for name in reads - {"code"}:  # which requires the sandbox
        assert not load_reward(name, batched=False).scores_groups
