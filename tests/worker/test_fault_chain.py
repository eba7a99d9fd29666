"""A run of a hundred steps whose processes are killed at random, again and again, and which is resumed by the same
command each time: it ends with the ledger of a run that never stopped, and nobody has to delete anything."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.worker.test_failures import Launched
from tests.worker.tiny_run import write_checkpoint, write_config

STEPS, SAVE_INTERVAL = int(os.environ.get("CHAIN_STEPS", "100")), 5
PHASES = ["rollout", "log_probs", "train", "refit"]  # each writes a line with its name into the log of every rank
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
START_SECONDS, END_SECONDS = 120, 60


class Chain:
    """One run, the starts that it takes, and the faults of each. ``faults`` lists what was done, for the report."""

    def __init__(self, folder: Path, checkpoint: Path, seed: int) -> None:
        self.folder, self.run_dir, self.random = folder, folder / "runs" / "tiny", random.Random(seed)
        self.faults: list[str] = []
        self.config = write_config(
            folder,
            checkpoint,
            run={"num_rollout": STEPS},
            eval={"eval_prompt_data": {"held": str(folder / "data.jsonl")}, "eval_interval": 7},
            checkpoint={"resume": True, "save_interval": SAVE_INTERVAL, "export_final": True},
            algorithm={"kl_loss_coef": 0.001},  # for the phase of the reference model
            reward={"rm_type": "tests.recipe_run:coin", "reward_workers": 1},
            determinism={"deterministic": True},
        )

    def run_to_its_end(self, faults: int) -> None:
        """Start the run until it ends by itself; hurt it ``faults`` times on the way."""
        while True:
            # every eighth start is a user's, whose interpreters import for seconds
            run = Launched(self.folder, self.config, preloaded=self.random.random() > 0.125)
            try:
                while run.launcher.poll() is None and len(self.faults) < faults:
                    self._hurt(run)
                status = run.launcher.wait(START_SECONDS + END_SECONDS)
                self._wait_for_quiet(run)
            finally:
                run.clean_up()
            assert status == 0 or self.faults, run.report()
            if status == 0:
                return
            assert "Traceback" not in run.stderr(), self._report(run)
            said = re.findall(r"^miles-spmd: (?!warning: ).*", run.stderr(), re.MULTILINE)
            # a launcher that is killed itself, or told to stop before it has ranks, has nobody to speak for it
            assert len(said) <= 1, self._report(run)

    def _hurt(self, run: Launched) -> None:
        """Wait for a moment of a random kind, kill a random process and see what becomes of the run."""
        kind = self.random.choice(["start", "save", "any", *PHASES])
        before = self._progress()
        if not self._moment(kind, run):
            return
        processes = sorted(run.processes())
        if not processes:
            return
        victim, number = self.random.choice(processes), self.random.choice(SIGNALS)
        with contextlib.suppress(OSError):
            self.faults.append(f"{kind}, after {before}: {number.name} to {victim} of {processes}, {_name(victim)}")
            os.kill(victim, number)
        # an idle reward process is replaced and the run goes on; everything else ends it
        self._over(lambda: self._progress() != before, END_SECONDS, run)

    def _moment(self, kind: str, run: Launched) -> bool:
        """Wait for it; false where the run ended first."""
        if kind == "start":
            return self._over(lambda: False, self.random.uniform(0, 4), run)
        if kind == "any":
            self._over(lambda: self._progress() > 0, START_SECONDS, run)
            return self._over(lambda: False, self.random.uniform(0, 0.7), run)
        if kind == "save":
            known = set(self._checkpoints())
            found = self._over(lambda: bool(set(self._checkpoints()) - known), START_SECONDS, run)
            time.sleep(self.random.uniform(0, 0.03))
            return found
        log = self.run_dir / "logs" / f"rank-{self.random.choice([0, 1])}.log"
        start = log.stat().st_size if log.exists() else 0
        pattern = re.compile(rf"^memory, {kind} [1-9]".encode(), re.MULTILINE)

        def reached() -> bool:
            if not log.exists():
                return False
            with log.open("rb") as file:
                file.seek(start)
                return pattern.search(file.read()) is not None

        return self._over(reached, START_SECONDS, run)

    def _over(self, condition: Callable[[], bool], seconds: float, run: Launched) -> bool:
        """Wait for the condition or the time; true if the run still goes on then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and run.launcher.poll() is None and not condition():
            time.sleep(0.002)
        return run.launcher.poll() is None

    def _wait_for_quiet(self, run: Launched) -> None:
        """Wait until no process of the run is left."""
        end = time.monotonic() + END_SECONDS
        while run.processes():
            assert time.monotonic() < end, self._report(run)
            time.sleep(0.02)

    def _progress(self) -> int:
        """The number of lines of metrics so far."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def _checkpoints(self) -> Iterator[str]:
        return (path.name for path in self.run_dir.glob("checkpoints/*"))

    def _report(self, run: Launched) -> str:
        return "\n".join([*self.faults, run.report()])


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[-60:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    chain = Chain(tmp_path_factory.mktemp("unhurt"), checkpoint, 0)
    chain.run_to_its_end(0)
    return chain.run_dir


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.timeout(3600)
def test_killed_and_resumed(tmp_path: Path, checkpoint: Path, unhurt: Path, seed: int) -> None:
    chain = Chain(tmp_path, checkpoint, seed)
    chain.run_to_its_end(43)
    print("\n".join(chain.faults))
    found = compare(verify(unhurt), verify(chain.run_dir))
    assert found.equal, found.difference
    assert found.steps == list(range(STEPS))
    steps = [json.loads(line)["step"] for line in (chain.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert set(steps) == set(range(STEPS + 1))
    assert steps[-1] == STEPS
    weights = Path("export", "model.safetensors")
    assert (chain.run_dir / weights).read_bytes() == (unhurt / weights).read_bytes()
