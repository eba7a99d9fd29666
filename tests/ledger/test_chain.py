"""The files of a ledger, damaged in every way: and as a run leaves them that is killed at any moment."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_spmd.ledger import step_data
from miles_spmd.ledger.chain import FILE, FOLDER, SEAL_FILE, Chain, LedgerError, links, read_record, verify
from miles_spmd.ledger.compare import compare
from miles_spmd.ledger.entries import Context, Saved, Step, digests
from miles_spmd.ledger.step_data import DataStore, SampleData, StepData
from miles_spmd.types.sample import Prompt
from tests.samples import sample_of

SEED = 3


def rollout(step: int, turn_reward: float | None = None, **reward: Any) -> SampleData:
    prompt = Prompt(f"data.jsonl:{step + 1}", "1 + 1 =", [4, 5, step])
    given = {"reward": 0.5, "reward_detail": {"format": 0.05}} | reward
    samples = [sample_of(prompt, i, [7, i], [-0.5, -1.0], **given) for i in (0, 1)]
    if turn_reward is not None:
        samples[0].trajectory.reward_turn(turn_reward)
    return SampleData.of(samples, dropped=0)


class Run:
    """Writes a ledger as a run does: an entry per step and its data, and one per checkpoint, every two steps."""

    def __init__(self, folder: Path, room: int = 2**20, **reward: Any) -> None:
        """Begin, or resume after the newest checkpoint."""
        found = list(links(folder)) if (folder / FOLDER / FILE).is_file() else []
        last = next((link for link in reversed(found) if isinstance(link.entry, Saved)), None)
        self._first, self._reward = last.entry.step if last else 0, reward
        self.chain = Chain(folder, last)
        if last is None:
            run = {"seed": SEED}
            self.chain.append(Context(0, {"run": run}, "code", {}, {"actor": ["w"]}, {"actor": digests([1])}))
        self.data = DataStore(folder, self._first, room, self.chain.seal_data)

    def steps(self, end: int) -> Iterator[int]:
        for step in range(self._first, end):
            data = rollout(step, **self._reward)
            self.chain.append(Step(step, data.digests(SEED, step), []))
            self.data.write(step, StepData(data, []))
            yield step
            if step % 2:
                self.data.wait()
                self.chain.append(Saved(step + 1, {"actor": digests([step])}, {}))
                self.chain.sync()

    def finish(self, end: int) -> None:
        list(self.steps(end))
        self.data.close()
        self.chain.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two steps."""
    Run(tmp_path / "run").finish(2)
    assert verify(tmp_path / "run").entries == 4
    return tmp_path / "run"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run of one step."""
    Run(tmp_path / "small").finish(1)
    return tmp_path / "small"


def is_found(folder: Path, read: Callable[[Path], Any] = read_record) -> bool:
    try:
        read(folder)
    except LedgerError:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "read"), [(FILE, read_record), (SEAL_FILE, read_record), ("data/step_000000.msgpack.z", verify)]
)
def test_every_bit_counts_and_every_byte(small: Path, name: str, read: Callable[[Path], Any]) -> None:
    """Of the entries, of the seal, and of recorded data."""
    file = small / FOLDER / name
    whole = file.read_bytes()
    for place, bit in itertools.product(range(len(whole)), range(8)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        assert is_found(small, read), f"bit {bit} of byte {place}: {whole[max(0, place - 9) : place + 9]!r}"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert is_found(small, read), f"cut after {length} of {len(whole)} bytes"
    file.unlink()
    assert is_found(small, read)
    file.write_bytes(whole)
    assert not is_found(small, read)


@pytest.mark.parametrize("byte", [b"\r", b"\n", b" "])
def test_any_byte_in_place_of_another_or_beside_it(small: Path, byte: bytes) -> None:
    """Some bytes end a line to one reader and not to another."""
    file = small / FOLDER / FILE
    whole = file.read_bytes()
    for place in range(len(whole)):
        for after in {place, place + 1}:
            changed = whole[:place] + byte + whole[after:]
            file.write_bytes(changed)
            assert changed == whole or is_found(small), (place, after)


def test_what_was_cut_off_is_named(folder: Path) -> None:
    file = folder / FOLDER / FILE
    whole = file.read_bytes()
    ends = [link.end for link in links(folder)]
    file.write_bytes(whole[: ends[-3]])
    with pytest.raises(LedgerError, match=r"chain.jsonl: entry 2, after that of step 0: is missing or incomplete"):
        verify(folder)
    file.write_bytes(whole[:-1])
    with pytest.raises(LedgerError, match=r"chain.jsonl: entry 3, after that of step 1: is missing or incomplete"):
        verify(folder)
    (folder / FOLDER / SEAL_FILE).unlink()
    with pytest.raises(LedgerError, match=r"seal.json does not exist: without it .* checkpoint.resume=true writes it"):
        verify(folder)


def test_a_ledger_of_another_run_with_this_seal(folder: Path, tmp_path: Path) -> None:
    Run(tmp_path / "other", reward=0.25).finish(2)
    shutil.copy(tmp_path / "other" / FOLDER / FILE, folder / FOLDER / FILE)
    with pytest.raises(LedgerError, match=r"entry 3 is not the one that seal.json names: one of the"):
        verify(folder)


def test_a_run_killed_between_any_two_changes_of_files(tmp_path: Path) -> None:
    """Its ledger holds, and the resumed run leaves the ledger of one that never stopped. The data of two steps fit."""
    room = 2 * len(step_file(tmp_path / "one"))
    whole = tmp_path / "whole"
    Run(whole, room).finish(6)
    assert [step_data.path_of(whole, step).is_file() for step in range(6)] == [False] * 4 + [True] * 2
    for number in itertools.count(1):
        folder = tmp_path / f"killed_{number}"
        if not killed(folder, room, number):
            break
        if (folder / FOLDER / FILE).is_file() and (folder / FOLDER / FILE).stat().st_size:
            verify(folder)
        resumed = shutil.copytree(folder, tmp_path / "resumed", dirs_exist_ok=True)
        again = killed(resumed, room, 1 + number % 7)
        for run in (folder, *([resumed] if again else [])):
            Run(run, room).finish(6)
            verify(run)
            for file in (FILE, SEAL_FILE):
                assert (run / FOLDER / file).read_bytes() == (whole / FOLDER / file).read_bytes()
        shutil.rmtree(resumed)
    assert number > 40


def killed(folder: Path, room: int, number: int) -> bool:
    """Run six steps in a process that dies before it changes a file for the ``number``-th time. False if it ends."""
    process = os.fork()
    if not process:
        left = itertools.count(number - 1, -1)
        for name in ("replace", "unlink", "write_bytes"):
            real = getattr(Path, name)
            setattr(Path, name, lambda *arguments, real=real: real(*arguments) if next(left) else os._exit(9))
        Run(folder, room).finish(6)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def step_file(folder: Path) -> bytes:
    Run(folder).finish(2)
    return step_data.path_of(folder, 1).read_bytes()


@pytest.mark.parametrize("turn", range(3))
def test_a_run_that_is_really_killed(tmp_path: Path, turn: int) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.ledger.test_chain import Run\n"
        "for step in Run(Path(sys.argv[1]), 4000).steps(10**6): print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    before = [process.stdout.readline() for _ in range(5)]
    time.sleep(random.Random(turn).random() / 5)
    process.send_signal(signal.SIGKILL)
    done = int([*before, *process.stdout.read().splitlines()][-2])  # the last line may have been cut
    process.wait()
    record = verify(tmp_path)
    assert set(record.steps) >= set(range(done))
    Run(tmp_path, 4000).finish(done + 4)
    assert set(verify(tmp_path).steps) == set(range(done + 4))


def test_entries_after_the_sealed_ones_must_hold_too(folder: Path) -> None:
    """A killed run may have left one; it is not taken for an unfinished one where it is whole."""
    seal = (folder / FOLDER / SEAL_FILE).read_bytes()
    run = Run(folder)
    run.chain.append(Step(2, rollout(2).digests(SEED, 2), []))
    (folder / FOLDER / SEAL_FILE).write_bytes(seal)
    assert set(verify(folder).steps) == set(range(3))
    file = folder / FOLDER / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(LedgerError, match="entry 4, after that of saved 2: its hash does not follow"):
        verify(folder)


# --- the first difference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ({"reward": 0.5}, {"reward": 1.0}, "reward 0.5 | 1.0"),
        ({"reward_detail": {"format": 0.05}}, {"reward_detail": {"format": 0.1}}, "reward detail format 0.05 | 0.1"),
        ({"reward_detail": {"a": 1.0}}, {"reward_detail": {"a": 1.0, "b": 2.0}}, "reward detail b None | 2.0"),
        ({"reward_detail": {"a": 0.0}}, {"reward_detail": {"a": -0.0}}, "reward detail a 0.0 | -0.0"),
        (
            {"reward_detail": {"a": 1.0, "b": 2.0}},
            {"reward_detail": {"b": 2.0, "a": 1.0}},
            "reward details in another order: a, b | b, a",
        ),
        (
            {"reward": 0.5, "reward_detail": {"a": float("nan"), "b": 1.0}},
            {"reward": 1.0, "reward_detail": {"a": float("nan"), "b": 0.0}},
            "reward 0.5 | 1.0, detail b 1.0 | 0.0",
        ),
        ({"turn_reward": 0.25}, {"turn_reward": 0.5}, "reward of turns [0.25] | [0.5]"),
        ({}, {"turn_reward": 0.0}, "reward of turns [] | [0.0]"),
    ],
)
def test_reward_details_are_named(tmp_path: Path, a: Any, b: Any, difference: str) -> None:
    for name, reward in (("a", a), ("b", b)):
        Run(tmp_path / name, **reward).finish(2)
    found = compare(verify(tmp_path / "a"), verify(tmp_path / "b")).difference
    assert found == f"step 0, rollout: sample 0 (response 0 to data.jsonl:1): {difference}"


def test_without_any_entry(tmp_path: Path) -> None:
    Chain(tmp_path, None).close()
    with pytest.raises(LedgerError, match="is empty"):
        read_record(tmp_path)
    assert np.frombuffer((tmp_path / FOLDER / FILE).read_bytes(), np.uint8).size == 0
