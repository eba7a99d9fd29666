"""Rewards in processes of their own, so that a function that hangs, crashes or leaks memory does not harm the run."""

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
from miles_spmd.rewards.failure import BadReward
from miles_spmd.rewards.functions import load_reward
from miles_spmd.types.sample import Sample

_IMPORT_TIMEOUT = 120.0  # seconds in which a reward function's module must be imported
_GRACE = 2.0  # seconds that an async function's own timeout has before its process is killed
_REMEDY = "; fix the function or the row, or raise the limit in [reward]"


class RewardPool:
    """Scores samples by ``reward.rm_type``.

    ``exact`` runs in place: it costs less than sending the sample. Everything else runs in ``reward_workers``
    processes; a call is one sample, or one prompt's group (neighbours in ``submit``'s list) where the function takes
    groups or is async. A call that takes longer than ``reward_timeout`` is killed with its process, a process that
    grows by more than ``reward_memory_gib`` gets a MemoryError. Samples travel without their ``rollout_log_probs``.

    Make it in the main thread: its processes die with the thread that started them.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Raises RewardError if the function cannot be imported or called."""
        self._config = config
        self._pool: ProcessPool | None = None
        self._in_place = load_reward("exact", batched=False) if config.rm_type == "exact" else None
        self._by_group = True
        self._unfinished: set[_Gathered] = set()
        if self._in_place:
            return
        self._pool = ProcessPool(
            max_workers=config.reward_workers,
            context=multiprocessing.get_context("spawn"),  # type: ignore[arg-type]
            initializer=process.initialize,
            initargs=(config, os.getpid()),
        )
        try:
            self._by_group = self._pool.schedule(process.scores_groups).result(timeout=_IMPORT_TIMEOUT)
        except (TimeoutError, ProcessExpired) as error:
            self.close()
            problem = f"was not imported within {_IMPORT_TIMEOUT:g} s, or its import ended the process ({error})"
            raise RewardError(f"reward.rm_type = {config.rm_type!r} {problem}; import its module by itself") from error
        except RewardError:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, samples: list[Sample]) -> Future[list[Score]]:
        """Start scoring and return at once. The future gives one score per sample, in order, or raises RewardError."""
        if self._by_group:
            calls = [list(group) for _, group in itertools.groupby(samples, key=lambda s: s.prompt.uid)]
        else:
            calls = [[sample] for sample in samples]
        gathered = _Gathered(len(calls))
        self._unfinished.add(gathered)
        gathered.future.add_done_callback(lambda _: self._unfinished.discard(gathered))
        for number, call in enumerate(calls):
            self._start(call).add_done_callback(partial(self._finish, gathered, number, call))
        return gathered.future

    def close(self) -> None:
        """Kill what still runs and wait until no process is left; unfinished futures raise RewardError."""
        for gathered in list(self._unfinished):
            gathered.fail(self._error(BadReward("was stopped because the reward pool closed"), remedy=""))
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _start(self, call: list[Sample]) -> Future[list[Score]]:
        timeout = self._config.reward_timeout + (_GRACE if self._by_group else 0)
        if self._pool is not None:
            light = [msgspec.structs.replace(s, rollout_log_probs=[]) for s in call]
            started: Any = self._pool.schedule(process.score, args=(light,), timeout=timeout)
            return started
        if self._in_place is None:
            raise RuntimeError("the reward pool is closed")
        done: Future[list[Score]] = Future()
        try:
            done.set_result(self._in_place.score(call, timeout))
        except BadReward as error:
            done.set_exception(error)
        return done

    def _finish(self, gathered: _Gathered, number: int, call: list[Sample], done: Future[list[Score]]) -> None:
        try:
            gathered.add(number, self._result(done, call))
        except RewardError as error:
            gathered.fail(error)

    def _result(self, done: Future[list[Score]], call: list[Sample]) -> list[Score]:
        """Return a finished call's scores. Raises RewardError."""
        uid, index = call[0].prompt.uid, call[0].index if len(call) == 1 else None
        try:
            return done.result()
        except (TimeoutError, ProcessExpired) as error:
            if self._config.rm_type == "math":  # an answer that cannot be verified in time and memory is wrong
                return [Score(0.0, {"killed": 1.0}) for _ in call]
            if isinstance(error, ProcessExpired):
                problem = f"ended its process (exit code {error.exitcode})"
            else:
                problem = f"took longer than reward.reward_timeout = {self._config.reward_timeout:g} s"
            raise self._error(BadReward(problem, index), uid) from error
        except BadReward as error:
            raise self._error(error, uid) from error
        except RewardError:
            raise
        except Exception as error:
            raise self._error(BadReward(f"could not be called: {type(error).__name__}: {error}", index), uid) from error

    def _error(self, failure: BadReward, uid: str | None = None, remedy: str = _REMEDY) -> RewardError:
        where = "" if uid is None else f" on prompt {uid}"
        if failure.index is not None:
            where += f", sample {failure.index},"
        trace = f"\n{failure.trace}" if failure.trace else ""
        return RewardError(f"reward {self._config.rm_type!r}{where} {failure.problem}{remedy}{trace}")


class _Gathered:
    """One future for the results of several calls, in order; it fails with the first call that fails."""

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
