"""Rewards in processes of their own, so that a function that hangs, crashes or leaks memory does not harm the run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue

import msgspec

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.reward import RewardError, Score
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.rewards.functions import RewardFunction, load_reward
from miles_spmd.rewards.process import RewardProcess
from miles_spmd.types.sample import Sample


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
        in_place = config.rm_type == "exact"
        self._processes = [RewardProcess(config) for _ in range(0 if in_place else config.reward_workers)]
        self._idle: SimpleQueue[RewardProcess | RewardFunction] = SimpleQueue()
        scorers: Sequence[RewardProcess | RewardFunction] = self._processes or [load_reward("exact", batched=False)]
        for scorer in scorers:
            self._idle.put(scorer)
        self._threads = ThreadPoolExecutor(self._idle.qsize(), "reward")  # each waits for one process
        self._gatherers = ThreadPoolExecutor(64, "rewards")  # each waits for the calls of one group
        try:
            self._by_group = in_place or self._processes[0].scores_groups()
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
        started = [self._threads.submit(self._score, call) for call in calls]
        return self._gatherers.submit(self._gather, started)

    def _gather(self, started: list[Future[list[Score]]]) -> list[Score]:
        try:
            done, _ = wait(started, return_when=FIRST_EXCEPTION)
            for call in [*done, *started]:
                call.result()
        except CancelledError:
            raise RewardError(f"reward {self._config.rm_type!r} was stopped because the reward pool closed") from None
        return [score for call in started for score in call.result()]

    def close(self) -> None:
        """Kill what still runs and wait until no process is left; unfinished futures raise RewardError."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        self._gatherers.shutdown()

    def _score(self, call: list[Sample]) -> list[Score]:
        """Make one call, in a thread that waits for it. Raises RewardError."""
        process = self._idle.get()
        try:
            return process.score([msgspec.structs.replace(s, rollout_log_probs=[]) for s in call])
        except BadReward as error:
            where = f" on prompt {call[0].prompt.uid}" + ("" if error.index is None else f", sample {error.index},")
            remedy = "; fix the function or the row, or raise the limit in [reward]"
            trace = f"\n{error.trace}" if error.trace else ""
            raise RewardError(f"reward {self._config.rm_type!r}{where} {error.problem}{remedy}{trace}") from error
        finally:
            self._idle.put(process)
