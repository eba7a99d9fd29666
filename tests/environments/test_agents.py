"""Agents that speak with the policy over HTTP, in a run."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.environments.messages import Begin, Failed, Finished
from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.quickstart.assets import build_assets
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import METRICS_FILE
from miles_spmd.types.sample import Prompt
from tests import forked
from tests.environments import test_pool

RUN = [
    *("run.num_rollout=2", "model.dtype=float32", "megatron.lr=1e-3", "data.apply_chat_template=true"),
    *("rollout_batch_size=4", "n_samples_per_prompt=2", "rollout_max_response_len=40"),
    *("determinism.deterministic=true", "train.max_tokens_per_gpu=4096", "environment.max_environment_failures=0"),
    *("checkpoint.save_final=false", "checkpoint.export_final=false", "telemetry.progress=none"),
    "environment.environment=tests.environments.agent_samples:curious",
]


def test_an_agent_in_a_run(tmp_path: Path) -> None:
    """What it makes of the policy's responses is trained with the tokens and log-probs of the engine, and repeats with
    other processes."""
    build_assets(tmp_path, name="calculator")
    (tmp_path / "run.toml").write_text(
        f"model.hf_checkpoint = '{tmp_path / 'model'}'\ndata.prompt_data = '{tmp_path / 'train.jsonl'}'\n"
    )
    for name, workers in (("one", 1), ("two", 2)):
        settings = [*RUN, f"run.output_dir={tmp_path}", f"run.name={name}", f"environment_workers={workers}"]
        command = ["-m", "miles_spmd", "train", str(tmp_path / "run.toml"), "--nproc-per-node=1"]
        done = forked.run(*command, *settings, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    found = compare(verify(tmp_path / "one"), verify(tmp_path / "two"))
    assert found.equal, found.difference
    metrics = read_metrics(tmp_path / "one" / METRICS_FILE)
    for row in (metrics[1], metrics[2]):
        assert row["parity/mismatches"] == 0
        assert row["parity/tokens"] > 100
        assert row["rollout/env/agent_trajectories"] == 5
        reasons = {key.rpartition("/")[2]: n for key, n in row.items() if key.startswith("rollout/env/session")}
        assert reasons == {"conversation": 2, "choices": 1, "fork": 1}
    recorded = step_data.read(tmp_path / "one", 1)
    assert recorded is not None
    assert recorded.samples is not None
    assert len(recorded.samples.uids) == 8 * 5
    command = ["-m", "miles_spmd", "train", str(tmp_path / "run.toml"), "--nproc-per-node=1"]
    longest = [*RUN, f"run.output_dir={tmp_path}", "run.name=longest", "environment.trained_leaves=longest"]
    done = forked.run(*command, *longest, "run.num_rollout=1", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    chosen, whole = (step_data.read(tmp_path / name, 0) for name in ("longest", "one"))
    assert chosen is not None and chosen.samples is not None  # noqa: PT018
    assert whole is not None and whole.samples is not None  # noqa: PT018
    for number, (one, other) in enumerate(zip(chosen.samples.segments, whole.samples.segments, strict=True)):
        assert [count for count, *_ in one] == [count for count, *_ in other]
        turns = [trained for _, sampled, trained in one if sampled]
        assert turns == ([True] * 3 if number % 5 == 0 else [False] * len(turns))
    row = read_metrics(tmp_path / "longest" / METRICS_FILE)[1]
    assert (row["rollout/fully_masked_samples"], row["parity/mismatches"]) == (8 * 4, 0)


def test_an_agent_fails_alone(tmp_path: Path) -> None:
    """The server of their process goes on for the others, and for those that come after them."""
    build_assets(tmp_path)
    agent = "tests.environments.agent_samples:stray"
    pool = test_pool.make(tmp_path / "model", agent, environment_timeout=5.0, environment_workers=1)
    labels = ["", "raise", "", "wait", "leave", ""]
    kinds = {"raise": "raised", "wait": "timeout"}
    try:
        for base, some in ((0, labels), (10, labels[:3])):
            begins = [Begin(base + n, Prompt(f"p:{n}", "", [7], label), 0, 30) for n, label in enumerate(some)]
            events = test_pool.play(pool, begins, seconds=60)
            for label, (*_, last) in zip(some, events.values(), strict=True):
                if label in kinds:
                    assert isinstance(last, Failed)
                    assert (last.kind, last.own) == (kinds[label], True)
                else:
                    assert isinstance(last, Finished)
                    assert len(last.ends) >= 2
    finally:
        pool.close()
