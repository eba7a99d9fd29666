"""Rewards in processes of their own, so that a function that hangs, crashes or leaks memory does not harm the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

from miles_spmd.config import RewardConfig, RewardTerm
from miles_spmd.plugins.reward import START, RewardError, Score, TrainerState
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.rewards.functions import load_reward
from miles_spmd.rewards.process import Function, RewardProcess
from miles_spmd.types.printable import printable
from miles_spmd.types.sample import Sample

_EXACT, _JUDGE = "exact", "judge"
_GATHERERS = 64  # groups that are waited for at the same time
_LONGEST_PROBLEM, _LONGEST_TRACE = 1000, 5000  # characters of what a user's function wrote into an error


class RewardPool:
    """Scores samples by the functions of ``[reward]``, or by others that were named when it was made.

    ``exact`` runs in place: it costs less than sending the sample. Everything else runs in ``reward_workers``
    processes; a call is one sample, or one prompt's group (neighbours in ``submit``'s list) where the function takes
    groups or is async. A call that takes longer than ``reward_timeout`` is killed with its process, a process that
    grows by more than ``reward_memory_gib`` gets a MemoryError. Samples travel without their ``rollout_log_probs``.
    ``judge`` is asked in place, too, where engines of the run hold it: they are not in this process.

    Make it in the main thread: its processes die with the thread that started them.
    """

    def __init__(
        self,
        config: RewardConfig,
        others: Sequence[RewardTerm] = (),
        log: Path | None = None,
        judge: Callable[[list[Sample]], Future[list[Score | None]]] | None = None,
    ) -> None:
        """``others``: further functions that :meth:`submit` may be given. ``log`` receives what functions print.
        ``judge`` starts scoring by engines of the run, and returns at once.

        Raises RewardError if a function cannot be imported or called.
        """
        self._config, self._closed = config, False
        self._exact = load_reward(_EXACT, batched=False)
        functions = list(dict.fromkeys(map(_function, [*config.terms, *others])))
        self._judge, in_place = judge, {_EXACT} if judge is None else {_EXACT, _JUDGE}
        functions = [function for function in functions if function.rm_type not in in_place]
        workers = config.reward_workers if functions else 0
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        self._processes = [RewardProcess(config, functions, log) for _ in range(workers)]
        self._idle: SimpleQueue[RewardProcess] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(config.reward_workers, "reward")  # each waits for one process
        self._gatherers = ThreadPoolExecutor(_GATHERERS, "rewards")  # each waits for the calls of one group
        try:
            self._by_group = {function: self._processes[0].scores_groups(function) for function in functions}
        except RewardError:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self, samples: list[Sample], terms: Sequence[RewardTerm] = (), state: TrainerState = START
    ) -> Future[list[Score]]:
        """Start scoring by ``terms`` (default: those of ``[reward]``) and return at once. ``state`` is that of the run.
        The future gives one score per sample, in order, or raises the RewardError of the first call that fails."""
        terms = terms or self._config.terms
        started = [self._start(term, samples, state) for term in terms]
        return self._gatherers.submit(self._gather, terms, samples, started)

    def _start(self, term: RewardTerm, samples: list[Sample], state: TrainerState) -> list[Future[list[Score | None]]]:
        if self._judge is not None and term.rm_type == _JUDGE:
            return [self._judge(samples)]
        return [self._threads.submit(self._score, term, call, state) for call in self._calls(term, samples)]

    def _calls(self, term: RewardTerm, samples: list[Sample]) -> list[list[Sample]]:
        if self._by_group.get(_function(term), True):
            return [list(group) for _, group in itertools.groupby(samples, key=lambda s: s.prompt.uid)]
        return [[sample] for sample in samples]

    def _gather(
        self, terms: Sequence[RewardTerm], samples: list[Sample], started: list[list[Future[list[Score | None]]]]
    ) -> list[Score]:
        try:
            calls = list(itertools.chain.from_iterable(started))
            done, _ = wait(calls, return_when=FIRST_EXCEPTION)
            for call in filter(done.__contains__, calls):  # of those that have failed, the first sample's
                call.result()
            scores = [[score for call in calls for score in call.result()] for calls in started]
        except CancelledError:
            name = terms[0].rm_type
            raise RewardError(f"reward {name!r} was stopped because the reward pool closed") from None
        for sample, of_sample in zip(samples, zip(*scores)):
            if not any(of_sample):
                names = ", ".join(repr(term.rm_type) for term in terms)
                raise RewardError(
                    f"reward {names} on prompt {sample.prompt.uid}, sample {sample.index}, returned None, which leaves "
                    "a sample to other functions under reward.further, and none scores this one; return a number"
                )
        return [combined(terms, of_sample) for of_sample in zip(*scores)]

    def close(self) -> None:
        """Kill what still runs and wait until no process is left; unfinished futures raise RewardError."""
        self._closed = True  # calls that have not begun fail at once; a cancelled future would never wake who waits
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        self._gatherers.shutdown()

    def _score(self, term: RewardTerm, call: list[Sample], state: TrainerState) -> list[Score | None]:
        """Make one call, in a thread that waits for it. Raises RewardError, and CancelledError once the pool closes."""
        if self._closed:
            raise CancelledError
        try:
            if term.rm_type == _EXACT:
                return self._exact.score(call)
            process = self._idle.get()
            try:
                light = [sample.without_log_probs() for sample in call]
                return process.score(_function(term), light, state)
            finally:
                self._idle.put(process)
        except BadReward as error:
            raise explained(term.rm_type, call[0], error) from error


def explained(rm_type: str, sample: Sample, error: BadReward) -> RewardError:
    """Return the error of a call of the reward ``rm_type`` that began with ``sample``."""
    where = f" on prompt {sample.prompt.uid}" + ("" if error.index is None else f", sample {error.index},")
    remedy = "; fix the function or the row, or raise the limit in [reward]"
    problem, trace = printable(error.problem, _LONGEST_PROBLEM), printable(error.trace, _LONGEST_TRACE)
    text = f"reward {rm_type!r}{where} {problem}{remedy}"
    return RewardError(f"{text}\n{trace}" if trace else text)


def _function(term: RewardTerm) -> Function:
    return Function(term.rm_type, term.reward_batched)


def combined(terms: Sequence[RewardTerm], scores: Sequence[Score | None]) -> Score:
    """Return the weighted sum of one sample's scores, of which those that are None do not count. Where there is more
    than one function, or a weight, the details have each function's own value under its name, and its details under
    ``name/detail``."""
    present = [(term, score) for term, score in zip(terms, scores) if score is not None]
    if len(terms) == 1 and terms[0].reward_weight == 1:
        return present[0][1]
    detail: dict[str, float] = {}
    for term, score in present:
        detail |= {term.name: score.value} | {f"{term.name}/{key}": value for key, value in score.detail.items()}
    total = sum(term.reward_weight * score.value for term, score in present)
    weighted = [[term.reward_weight * reward for reward in score.turn_rewards] for term, score in present]
    return Score(total, detail, [sum(of_turn) for of_turn in zip(*filter(None, weighted))])
