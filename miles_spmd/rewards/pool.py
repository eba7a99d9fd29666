"""Rewards in processes of their own, so that a function that hangs, crashes or leaks memory does not harm the run."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from queue import SimpleQueue

import msgspec

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.reward import RewardError, Score
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.rewards.functions import load_reward
from miles_spmd.rewards.process import RewardProcess
from miles_spmd.types.sample import Sample

_GRACE = 2.0  # seconds that an async function's own timeout has before its process is killed


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
        self._in_place = load_reward("exact", batched=False) if config.rm_type == "exact" else None
        self._processes = [RewardProcess(config) for _ in range(0 if self._in_place else config.reward_workers)]
        self._idle: SimpleQueue[RewardProcess] = SimpleQueue()
        self._threads = ThreadPoolExecutor(config.reward_workers, "reward")  # each waits for one process
        self._closed = False
        for process in self._processes:
            self._idle.put(process)
        try:
            self._by_group = not self._processes or self._processes[0].scores_groups()
        except RewardError:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, samples: list[Sample]) -> Future[list[Score]]:
        """Start scoring and return at once. The future gives one score per sample, in order, or raises the RewardError
        of the first call that fails."""
        if self._by_group:
            calls = [list(group) for _, group in itertools.groupby(samples, key=lambda s: s.prompt.uid)]
        else:
            calls = [[sample] for sample in samples]
        gathered: Future[list[Score]] = Future()
        missing, lock = len(calls), threading.Lock()

        def gather(done: Future[list[Score]]) -> None:
            nonlocal missing
            with lock:
                missing -= 1
                if gathered.done():
                    return
                try:
                    done.result()
                    if not missing:
                        gathered.set_result([score for scored in started for score in scored.result()])
                except CancelledError:
                    gathered.set_exception(self._closed_error())
                except RewardError as error:
                    gathered.set_exception(error)

        started = [self._threads.submit(self._score, call) for call in calls]
        for future in started:
            future.add_done_callback(gather)
        if not calls:
            gathered.set_result([])
        return gathered

    def close(self) -> None:
        """Kill what still runs and wait until no process is left; unfinished futures raise RewardError."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()

    def _score(self, call: list[Sample]) -> list[Score]:
        """Make one call, in a thread that waits for it. Raises RewardError."""
        uid, index = call[0].prompt.uid, call[0].index if len(call) == 1 else None
        try:
            return self._call(call)
        except RewardError:
            raise
        except BadReward as error:
            raise self._error(error, uid) from error
        except (TimeoutError, EOFError) as error:
            if self._closed:
                raise self._closed_error() from error
            if self._config.rm_type == "math":  # an answer that cannot be verified in time and memory is wrong
                return [Score(0.0, {"killed": 1.0}) for _ in call]
            if isinstance(error, EOFError):
                problem = f"ended its process ({error})"
            else:
                problem = f"took longer than reward.reward_timeout = {self._config.reward_timeout:g} s"
            raise self._error(BadReward(problem, index), uid) from error
        except Exception as error:
            raise self._error(BadReward(f"could not be called: {type(error).__name__}: {error}", index), uid) from error

    def _call(self, call: list[Sample]) -> list[Score]:
        timeout = self._config.reward_timeout + (_GRACE if self._by_group else 0)
        if self._in_place:
            return self._in_place.score(call, timeout)
        process = self._idle.get()
        try:
            return process.score([msgspec.structs.replace(s, rollout_log_probs=[]) for s in call], timeout)
        finally:
            self._idle.put(process)

    def _error(self, failure: BadReward, uid: str) -> RewardError:
        where = f" on prompt {uid}" + ("" if failure.index is None else f", sample {failure.index},")
        remedy = "; fix the function or the row, or raise the limit in [reward]"
        trace = f"\n{failure.trace}" if failure.trace else ""
        return RewardError(f"reward {self._config.rm_type!r}{where} {failure.problem}{remedy}{trace}")

    def _closed_error(self) -> RewardError:
        return RewardError(f"reward {self._config.rm_type!r} was stopped because the reward pool closed")
