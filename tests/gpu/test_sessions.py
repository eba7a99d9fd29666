"""Sessions on GPUs: what OpenAI's client gets is bitwise what the trainer computes, and a run repeats."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.gpu import machine
from tests.gpu.test_environments import EXACT
from tests.gpu.test_grpo import grpo, series

CLIENTS = [
    "environment.environment=miles_spmd.bench.turns:clients",
    "environment.environment_kwargs={turns = 4, new_tokens = 8, given = 5}",
    "data.apply_chat_template=true",
    "rollout_max_response_len=96",
    "eval.eval_prompt_data={}",  # four hundred more conversations, twice in each run
    *EXACT,
]


@machine.needs(1)
def test_conversations_of_clients_are_exact_and_repeat(warm: Path) -> None:
    once = grpo(warm, "clients", 1, 3, *CLIENTS, "environment.environment_workers=1")
    again = grpo(warm, "clients-again", 1, 3, *CLIENTS, "environment.environment_workers=3")
    for metrics in (once, again):
        assert min(series(metrics, "parity/tokens")) > 0
        assert max(series(metrics, "parity/mismatches")) == 0
        assert max(series(metrics, "rollout/turns")) == 4
        assert not [name for name in metrics[3] if "session_branches" in name]
    same = compare(verify(warm / "clients"), verify(warm / "clients-again"))
    assert same.equal, same.difference
    machine.measured("clients of the quickstart's model", {"prefix hits": series(once, "rollout/prefix_hit_rate")[-1]})
