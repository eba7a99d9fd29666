"""One process of the reward pool, from both sides of the pipe to it. Imports no torch unless the user's reward function
does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import CancelledError
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.plugins.reward import RewardError, Score
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.rewards.functions import load_reward
from miles_spmd.types.sample import Sample

IMPORT_TIMEOUT = 120.0  # seconds in which a reward function's module must be imported
_GRACE = 2.0  # seconds that an async function's own timeout has before its process is killed
_PR_SET_PDEATHSIG = 1


class RewardProcess:
    """The pool's side, used by one thread at a time. A process that has ended is replaced in the next call.

    It dies with the thread that has started it.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config, self._killed, self._lock = config, False, threading.Lock()
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        code = f"from miles_spmd.rewards.process import serve; serve({theirs.fileno()}, {os.getpid()})"
        self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
        theirs.close()
        self._pipe.send(self._config)
        self._scores_groups: bool | None = None

    def scores_groups(self) -> bool:
        """Wait until the function is imported and return whether calls are of whole groups. Raises RewardError if it
        cannot be imported or called."""
        if self._scores_groups is None:
            try:
                self._scores_groups = self._exchange(IMPORT_TIMEOUT)
            except (TimeoutError, EOFError) as error:
                problem = f"was not imported within {IMPORT_TIMEOUT:g} s, or its import ended the process ({error})"
                raise RewardError(
                    f"reward.rm_type = {self._config.rm_type!r} {problem}; import its module by itself"
                ) from error
        return self._scores_groups

    def score(self, samples: list[Sample]) -> list[Score]:
        """Call the reward function once. Raises BadReward, and RewardError where it can no longer be imported."""
        with self._lock:
            if self._process.poll() is not None and not self._killed:
                self._start()
        # an async function has a timeout of its own, which gives the better message
        timeout = self._config.reward_timeout + (_GRACE if self.scores_groups() else 0)
        try:
            scores: list[Score] = self._exchange(timeout, samples)
            return scores
        except TimeoutError:
            problem = f"took longer than reward.reward_timeout = {self._config.reward_timeout:g} s"
        except EOFError as error:
            problem = f"ended its process ({error})"
        if self._config.rm_type == "math":  # an answer that cannot be verified in time and memory is wrong
            return [Score(0.0, {"killed": 1.0}) for _ in samples]
        raise BadReward(problem, samples[0].index if len(samples) == 1 else None)

    def _exchange(self, timeout: float, *messages: Any) -> Any:
        """Send, and return or raise the reply. A process that neither reads nor replies in time is killed."""
        end = time.monotonic() + timeout
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            for message in messages:
                self._pipe.send(message)
            reply = self._pipe.recv()
        except (EOFError, OSError):
            late, status = time.monotonic() >= end, self._process.wait()
            if self._killed:
                raise CancelledError from None
            raise TimeoutError(f"after {timeout:g} s") if late else EOFError(f"exit code {status}") from None
        finally:
            timer.cancel()
            if time.monotonic() >= end:  # the timer may be killing it: the next call must not take it for alive
                self._end()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """End the process for good."""
        with self._lock:
            self._killed = True
        self._end()


def serve(descriptor: int, parent: int) -> None:
    """The process: import the reward function, set this process's limits, and score what comes through the pipe."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed controller leaves no process behind
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    pipe = Connection(descriptor)
    with contextlib.suppress(EOFError):
        config: RewardConfig = pipe.recv()
        try:
            reward = load_reward(config.rm_type, config.reward_batched)
        except PlugPointError as error:
            pipe.send(RewardError(f"{error}\n{traceback.format_exc()}" if error.__cause__ else str(error)))
            return
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + int(config.reward_memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send(reward.scores_groups)
        while True:
            try:
                pipe.send(reward.score(pipe.recv(), config.reward_timeout))
            except BadReward as error:
                pipe.send(error)
            except MemoryError:
                pipe.send(BadReward("ran out of the memory that reward.reward_memory_gib allows"))
