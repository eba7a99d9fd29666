"""Rewards in processes of their own, so that a function that hangs, crashes or eats memory cannot hurt the run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
from pebble import ProcessExpired, ProcessPool

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.reward import RewardError, Score
from miles_spmd.rewards import process
from miles_spmd.rewards.exact import exact
from miles_spmd.rewards.process import Failed
from miles_spmd.types.sample import Sample

_IMPORT_TIMEOUT = 120.0  # seconds in which a reward function's module must be imported
_GRACE = 2.0  # seconds an async function's own timeout is given before its process is killed


class RewardPool:
    """Scores samples by ``reward.rm_type``.

    ``exact`` is computed in place: it costs less than sending the sample. Everything else runs in
    ``reward_workers`` processes; a call is one sample, or one prompt's group (neighbours in ``submit``'s list) where
    the function takes groups or is async. A call that takes longer than ``reward_timeout`` is killed with its process,
    a process that grows by more than ``reward_memory_gib`` gets a MemoryError. Samples travel without their
    ``rollout_log_probs``.

    Make it in the main thread: its processes die with the thread that started them.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Raises RewardError if the function cannot be imported or called."""
        self._config = config
        self._pool: ProcessPool | None = None
        self._unfinished: set[_Gathered] = set()
        self._wants_groups = False
        if config.rm_type == "exact":
            return
        self._pool = ProcessPool(
            max_workers=config.reward_workers,
            context=multiprocessing.get_context("spawn"),  # type: ignore[arg-type]
            initializer=process.initialize,
            initargs=(config, os.getpid()),
        )
        try:
            answer = self._pool.schedule(process.wants_groups).result(timeout=_IMPORT_TIMEOUT)
        except (TimeoutError, ProcessExpired) as error:
            answer = Failed(f"was not imported within {_IMPORT_TIMEOUT:g} s, or its import ends the process ({error})")
        if isinstance(answer, Failed):
            self.close()
            raise RewardError(self._message(answer, "; check reward.rm_type"))
        self._wants_groups = answer

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, samples: list[Sample]) -> Future[list[Score]]:
        """Start scoring; returns at once. The future gives one score per sample, in order, or raises RewardError."""
        if self._config.rm_type == "exact":
            return self._exact(samples)
        if self._pool is None:
            raise RuntimeError("the reward pool is closed")
        if self._wants_groups:
            calls = [list(group) for _, group in itertools.groupby(samples, key=lambda s: s.prompt.uid)]
        else:
            calls = [[sample] for sample in samples]
        gathered = _Gathered(len(calls))
        self._unfinished.add(gathered)
        gathered.future.add_done_callback(lambda _: self._unfinished.discard(gathered))
        timeout = self._config.reward_timeout + (_GRACE if self._wants_groups else 0)
        for number, call in enumerate(calls):
            light = [msgspec.structs.replace(s, rollout_log_probs=[]) for s in call]
            task: Any = self._pool.schedule(process.score, args=(light,), timeout=timeout)
            task.add_done_callback(partial(self._finish, gathered, number, call))
        return gathered.future

    def close(self) -> None:
        """Kill what still runs and wait until no process is left; unfinished futures raise RewardError."""
        for gathered in list(self._unfinished):
            gathered.fail(RewardError(self._message(Failed("was stopped because the reward pool closed"), "")))
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _exact(self, samples: list[Sample]) -> Future[list[Score]]:
        future: Future[list[Score]] = Future()
        scores = []
        for sample in samples:
            try:
                scores.append(Score(exact(sample.text, sample.prompt.label)))
            except ValueError as error:
                failed = Failed(f"raised ValueError: {error}", sample.index)
                future.set_exception(RewardError(self._message(failed, _REMEDY, sample.prompt.uid)))
                return future
        future.set_result(scores)
        return future

    def _finish(self, gathered: _Gathered, number: int, call: list[Sample], done: Future[list[Score] | Failed]) -> None:
        try:
            gathered.add(number, self._result(done, call))
        except RewardError as error:
            gathered.fail(error)

    def _result(self, done: Future[list[Score] | Failed], call: list[Sample]) -> list[Score]:
        """A finished call's scores. Raises RewardError."""
        index = call[0].index if len(call) == 1 else None
        try:
            answer = done.result()
        except (TimeoutError, ProcessExpired) as error:
            if self._config.rm_type == "math":  # an answer that cannot be verified in time and memory is wrong
                return [Score(0.0, {"killed": 1.0}) for _ in call]
            if isinstance(error, ProcessExpired):
                problem = f"ended its process (exit code {error.exitcode})"
            else:
                problem = f"took longer than reward.reward_timeout = {self._config.reward_timeout:g} s"
            answer = Failed(problem, index)
        except Exception as error:
            answer = Failed(f"could not be called: {type(error).__name__}: {error}", index)
        if isinstance(answer, Failed):
            raise RewardError(self._message(answer, _REMEDY, call[0].prompt.uid))
        return answer

    def _message(self, failed: Failed, remedy: str, uid: str | None = None) -> str:
        where = "" if uid is None else f" on prompt {uid}"
        if failed.index is not None:
            where += f", sample {failed.index},"
        trace = f"\n{failed.trace}" if failed.trace else ""
        return f"reward {self._config.rm_type!r}{where} {failed.problem}{remedy}{trace}"


_REMEDY = "; mend the function or the row, or raise the limit in [reward]"


class _Gathered:
    """One future for the results of several calls, in order; the first failure is its failure."""

    def __init__(self, count: int) -> None:
        self.future: Future[list[Score]] = Future()
        self._results: list[list[Score]] = [[] for _ in range(count)]
        self._missing = count
        self._lock = threading.Lock()
        if not count:
            self.future.set_result([])

    def add(self, number: int, scores: list[Score]) -> None:
        with self._lock:
            self._results[number] = scores
            self._missing -= 1
            if not self._missing:
                self.future.set_result([score for scores in self._results for score in scores])

    def fail(self, error: RewardError) -> None:
        with self._lock:
            self._missing = -1
            if not self.future.done():
                self.future.set_exception(error)
