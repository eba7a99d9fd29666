"""A run of a hundred steps whose processes are killed again and again, each time in a phase and a step that were drawn
beforehand, and which is resumed by the same command each time: it ends with the files of a run that never stopped, no
step is lost that was in a checkpoint, and nobody has to delete anything.

tests/worker/gate.py stops a process of the run inside the phase that the next fault is bound to. So every fault
strikes, and strikes in that phase, whatever the seed and the speed of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from miles_spmd.controller.checkpoint_folders import STATE_FILE, read, step_folder
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from tests.worker.gate import write_hook
from tests.worker.launched import REPOSITORY, Launched
from tests.worker.tiny_run import write_config

STEPS, SAVE_INTERVAL = 100, 5
SAVES, EACH = 12, 6  # faults of a chain in saves, and in each other phase of a step; the rest is in starts
PHASES = ["rollout", "log_probs", "train", "refit", "save"]  # of a step, in order
VICTIMS = ["launcher", "rank_0", "rank_1", "controller", "reward"]
SIGNALS = [signal.SIGKILL, signal.SIGTERM]
HOLDERS = {
    "rollout": ["controller", "rank_0", "rank_1", "reward"],
    "save": ["controller", "controller", "rank_0", "rank_1"],
}
START_SECONDS, RUN_SECONDS = 600, 900  # generous: other tests may use the machine
COUNTED = 10  # the step whose calls of functions are counted
END_SECONDS = 60  # a run ends within a few, on a machine that does nothing else


@dataclass(frozen=True)
class Fault:
    """``number`` goes to ``victim`` when ``holder`` is at that ``share`` of its calls in this phase of this step.

    In a start: at that share of an unhurt start, counted from when there is such a process, and at the latest when
    ``holder`` is ready.
    """

    phase: str
    step: int
    holder: str
    share: float
    victim: str
    number: signal.Signals

    @property
    def ends_the_run(self) -> bool:
        """Reward processes leave requests to stop to others, and an idle one that is killed is replaced."""
        return self.victim != "reward" or (self.holder == "reward" and self.number is signal.SIGKILL)

    @property
    def asks_to_stop(self) -> bool:
        return self.number is signal.SIGTERM and self.victim != "reward"

    @property
    def place(self) -> tuple[int, int]:
        """Where it is in the run: a refit and a save before a step belong to the one before."""
        order = PHASES.index(self.phase)
        return self.step - (order > PHASES.index("train")), order


def draw(chance: random.Random, count: int) -> list[Fault]:
    """``count`` faults in the order of the run, no two of them in the same phase of the same step, and none in a step
    after a request to stop, with which that step is completed and saved."""
    while True:
        faults = _draw(chance, count)
        bound = [fault for fault in faults if fault.phase != "start"]
        if not any(a.asks_to_stop and a.place[0] == b.place[0] for a, b in pairwise(bound)):
            return faults


def _draw(chance: random.Random, count: int) -> list[Fault]:
    """Every process gets every signal in a save, and as far as it goes in the other phases."""

    def some(phase: str, steps: list[int]) -> list[Fault]:
        kinds = [(victim, number) for victim in VICTIMS for number in SIGNALS]
        kinds = [kind for _ in range(2) for kind in chance.sample(kinds, len(kinds))][: len(steps)]
        holders = HOLDERS.get(phase, ["controller", "rank_0", "rank_1"])
        return [
            Fault(phase, step, chance.choice(holders), chance.random(), victim, number)
            for step, (victim, number) in zip(steps, kinds)
        ]

    found = some("save", chance.sample(range(SAVE_INTERVAL, STEPS + 1, SAVE_INTERVAL), SAVES))
    for phase in PHASES[:-1]:
        steps = range(1, STEPS + 1) if phase == "refit" else range(STEPS)
        found += some(phase, chance.sample(steps, EACH))
    found.sort(key=lambda fault: fault.place)
    # A start is struck only where there certainly is one: the first, and those after what ends the run.
    # With a request to stop in the last step the run is complete.
    ended = [f.ends_the_run and not (f.asks_to_stop and f.place[0] == STEPS - 1) for f in found[:-1]]
    starts = [0, *(index + 1 for index, ends in enumerate(ended) if ends)]
    starts = sorted(chance.sample(starts, count - len(found)), reverse=True)
    for index, fault in zip(starts, some("start", [0] * len(starts))):
        holder = chance.choice(["rank_0", "rank_1"])
        found.insert(index, Fault("start", 0, holder, fault.share, fault.victim, fault.number))
    return found


@dataclass
class Strike:
    """A fault that struck, and what became of the run. It printed one row of the table."""

    fault: Fault
    pid: int
    held_at: str
    committed: set[int]  # steps of the checkpoints that were complete then
    began: float = field(default_factory=time.monotonic)
    result: str = "went on"
    saved: int = 0  # step of the newest checkpoint afterwards

    def row(self, index: int) -> str:
        f = self.fault
        where = f"{f.phase} {f.step}" if f.phase != "start" else "start"
        struck = f"{f.number.name} to {f.victim.replace('_', ' ')} ({self.pid})"
        saved = f"{max(self.committed, default=0)}->{self.saved}"
        held = f"{f.holder.replace('_', ' ')} at {self.held_at}"
        return f"{index:3} {where:13} {struck:31} {saved:8} {held:75.75} {self.result:.110}"


class Chain:
    """One run, the starts that it takes, and its faults."""

    def __init__(self, folder: Path, checkpoint: Path, calls: dict[tuple[str, str], int], start_seconds: float) -> None:
        """``calls``: of functions, by holder and phase; ``start_seconds``: of an unhurt start."""
        self.folder, self.run_dir, self.gate = folder, folder / "runs" / "tiny", folder / "gate"
        self.held = folder / "gate.held"
        self.calls, self.start_seconds = calls, start_seconds
        self.strikes: list[Strike] = []
        self.starts: list[tuple[int, int]] = []  # the number of lines of metrics and the newest checkpoint before each
        self.variables = {"PYTHONPATH": f"{write_hook(folder / 'hook')}:{REPOSITORY}", "GATE_FILE": str(self.gate)}
        self.config = write_config(
            folder,
            checkpoint,
            run={"num_rollout": STEPS},
            eval={"eval_prompt_data": {"held": str(folder / "data.jsonl")}, "eval_interval": 7},
            checkpoint={"resume": True, "save_interval": SAVE_INTERVAL, "export_final": True},
            algorithm={"kl_loss_coef": 0.001},  # for the phase of the reference model
            reward={"rm_type": "tests.worker.gate:coin", "reward_workers": 1},
            determinism={"deterministic": True},
        )

    def measure(self) -> None:
        """Run to the end unhurt, and learn the number of calls and how long a start takes."""
        self.gate.write_text(f"{COUNTED} all all 1")
        with self._started(preloaded=True) as run:
            began = time.monotonic()
            self._wait(lambda: bool(self._metrics()), START_SECONDS, run)
            self.start_seconds = time.monotonic() - began
            assert self._end(run, RUN_SECONDS) == 0, run.report()
        for line in Path(f"{self.gate}.calls").read_text().splitlines():
            holder, phase, calls = line.split()
            self.calls.setdefault((holder, phase), int(calls))

    def run_to_its_end(self, faults: list[Fault]) -> None:
        """Start the run until it ends by itself, with every fault on the way."""
        left = deque(faults)
        while True:
            self._aim(left[0] if left else None)
            # every tenth start is a user's, whose interpreters import for seconds
            with self._started(preloaded=len(self.starts) % 10 != 5) as run:
                before = len(self.strikes)
                while left and self._strike(run, left):
                    if self.strikes[-1].fault.ends_the_run:
                        break
                if self._end(run, END_SECONDS if left else RUN_SECONDS) == 0:
                    assert not left, self.report(run)
                    return
                assert len(self.strikes) > before, self.report(run)  # or it would have ended for another reason
                self._check_end(run, self.strikes[-1])

    def _strike(self, run: Launched, left: deque[Fault]) -> bool:
        """Wait for the moment of the next fault, and let it strike. False where the run ends before."""
        fault = left[0]
        if fault.phase == "start":
            self._wait(lambda: self._pid(fault.victim, run), START_SECONDS, run)
            self._wait(self._held, fault.share * self.start_seconds, run, fails=False)
        else:
            self._wait(self._held, START_SECONDS, run)
        if run.launcher.poll() is not None:
            return False
        pid = self._pid(fault.victim, run)
        assert pid is not None, self.report(run)
        _, place = self._held() or (0, f"{fault.share:.0%} of a start")
        self.strikes.append(Strike(fault, pid, place, self._committed()))
        os.kill(pid, fault.number)
        left.popleft()
        self._aim(left[0] if left and not fault.ends_the_run else None)
        self._let_go()
        self.strikes[-1].saved = max(self._committed(), default=0)
        return True

    def _held(self) -> tuple[int, str] | None:
        """The process that is stopped at the gate, and where."""
        if self.held.exists():
            pid, place = self.held.read_text().split(" ", 1)
            if _state(int(pid)) == "T":
                return int(pid), place
        return None

    def _let_go(self) -> None:
        if (held := self._held()) is not None:
            self.held.unlink()
            with contextlib.suppress(ProcessLookupError):  # it was the victim
                os.kill(held[0], signal.SIGCONT)

    def _end(self, run: Launched, seconds: float) -> int:
        """Wait until no process of the run is left."""

        def ended() -> bool:
            self._let_go()  # a process may have reached the gate while the victim of a start was struck
            return not run.processes()

        self._wait(ended, seconds, run)
        return run.launcher.wait(END_SECONDS)

    def _check_end(self, run: Launched, strike: Strike) -> None:
        """What holds whenever a fault has ended the run."""
        said = re.findall(r"^miles-spmd: (?!warning: ).*", run.stderr(), re.MULTILINE)
        strike.result = f"{time.monotonic() - strike.began:.1f} s: {'; '.join(said).replace('miles-spmd: ', '')}"
        strike.saved = max(self._committed(), default=0)
        assert "Traceback" not in run.stderr(), self.report(run)
        # a launcher that is killed itself, or told to stop before it has ranks, has nobody to speak for it
        assert len(said) == 1 or (strike.fault.phase == "start" and not said), self.report(run)
        assert strike.committed <= self._committed(), self.report(run)
        assert all(isinstance(json.loads(line), dict) for line in self._metrics()), self.report(run)

    def _aim(self, fault: Fault | None) -> None:
        """Set the gate to the moment of this fault."""
        scratch, line = self.gate.with_suffix(".tmp"), "-1 none none 0"
        if fault is not None:
            calls = self.calls.get((fault.holder, fault.phase), 0)
            line = f"{fault.step} {fault.phase} {fault.holder} {1 + int(fault.share * calls)}"
        scratch.write_text(line)
        scratch.rename(self.gate)

    @contextlib.contextmanager
    def _started(self, *, preloaded: bool) -> Iterator[Launched]:
        self.held.unlink(missing_ok=True)  # of a victim
        self.starts.append((len(self._metrics()), max(self._committed(), default=0)))
        run = Launched(self.folder, self.config, preloaded=preloaded, variables=self.variables)
        try:
            yield run
        finally:
            run.clean_up()

    def _wait(self, condition: Callable[[], object], seconds: float, run: Launched, *, fails: bool = True) -> None:
        """Wait for the condition, the time, or the end of a run that has not met it."""
        end = time.monotonic() + seconds
        while not condition() and (run.launcher.poll() is None or run.processes()):
            if time.monotonic() > end:
                assert not fails, self.report(run)
                return
            time.sleep(0.005)

    def _pid(self, name: str, run: Launched) -> int | None:
        """The living process of this name."""
        if name == "launcher":
            return run.launcher.pid
        if name.startswith("rank_"):
            name = name.replace("_", "-")
            logs = [self.run_dir / "logs" / f"{name}.starting.log", self.run_dir / "logs" / "latest" / f"{name}.log"]
            texts = [log.read_text() for log in logs if log.exists()]
            known = {int(pid) for text in texts for pid in re.findall(r"^--- .* pid (\d+)$", text, re.MULTILINE)}
            return next((pid for pid in run.processes() if pid in known), None)
        part = {"controller": b"miles_spmd.controller\0", "reward": b"miles_spmd.rewards.process"}[name]
        for pid in run.processes():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if part in Path(f"/proc/{pid}/cmdline").read_bytes() and _state(pid) != "Z":
                    return pid
        return None

    def _committed(self) -> set[int]:
        """The steps of the complete checkpoints."""
        return {int(path.parent.name[5:]) for path in self.run_dir.glob(f"checkpoints/step_??????/{STATE_FILE}")}

    def _metrics(self) -> list[str]:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def report(self, run: Launched | None = None) -> str:
        table = [strike.row(index) for index, strike in enumerate(self.strikes, 1)]
        return "\n".join([*table, *([run.report()] if run else [])])


def _state(pid: int) -> str:
    """What /proc calls it: "T" is stopped, "Z" has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("count", [42, 43])
def test_faults_are_in_order_and_differ(count: int) -> None:
    for seed in range(50):
        faults = draw(random.Random(seed), count)
        assert len(faults) == count
        assert Counter(fault.phase for fault in faults)["save"] == SAVES
        bound = [fault for fault in faults if fault.phase != "start"]
        places = [fault.place for fault in bound]
        assert places == sorted(set(places))
        for before, fault in pairwise(faults):
            assert fault.phase != "start" or before.ends_the_run


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("unhurt"), checkpoint, {}, 0)
    chain.measure()
    return chain


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "count"), [(1, 43), (2, 42)])
@pytest.mark.timeout(3600)
def test_killed_and_resumed(tmp_path: Path, checkpoint: Path, unhurt: Chain, seed: int, count: int) -> None:
    chain = Chain(tmp_path, checkpoint, unhurt.calls, unhurt.start_seconds)
    faults, began = draw(random.Random(seed), count), time.monotonic()
    try:
        chain.run_to_its_end(faults)
    finally:
        print(f"\n{chain.report()}\n{len(chain.strikes)} faults, {time.monotonic() - began:.0f} s")
    assert [strike.fault for strike in chain.strikes] == faults
    found = compare(verify(unhurt.run_dir), verify(chain.run_dir))
    assert found.equal, found.difference
    assert found.steps == list(range(STEPS))
    _check_metrics(chain)
    # Every checkpoint is there, with the digests of the unhurt run's weights and optimizer states; no other folder but
    # those that requests to stop have left.
    due = {step_folder(Path(), step) for step in range(SAVE_INTERVAL, STEPS + 1, SAVE_INTERVAL)}
    saved = {path.relative_to(chain.run_dir) for path in chain.run_dir.glob("checkpoints/*")}
    assert due <= saved
    assert all((chain.run_dir / folder / STATE_FILE).exists() for folder in saved)
    assert len(saved - due - {Path("checkpoints", "latest")}) <= sum(fault.asks_to_stop for fault in faults)
    for folder in due:
        assert read(chain.run_dir / folder).folders == read(unhurt.run_dir / folder).folders
    weights = Path("export", "model.safetensors")
    assert (chain.run_dir / weights).read_bytes() == (unhurt.run_dir / weights).read_bytes()


def _check_metrics(chain: Chain) -> None:
    """Each start went on from the newest checkpoint that there was; every step is there."""
    steps = [json.loads(line)["step"] for line in chain._metrics()]
    assert steps == sorted(steps)  # what is repeated was cut off, but for the line with which a start begins
    assert set(steps) == set(range(STEPS + 1))
    attempts = [json.loads(line) for line in (chain.run_dir / "attempts.jsonl").read_text().splitlines()]
    committed = {step for _, step in chain.starts}
    ready = [attempt["first_step"] for attempt in attempts if attempt.get("ready")]
    assert len(ready) > len(chain.starts) // 2
    assert ready == sorted(ready)
    assert set(ready) <= committed
