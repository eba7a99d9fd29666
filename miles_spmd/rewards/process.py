"""One process of the reward pool, from both sides of the pipe to it. Imports no torch unless the user's reward function
does.

A reward function is the user's code and runs with the user's rights: its process is not a sandbox. It keeps accidents
away from the run (time, memory, a crash, an exit), and secrets of the environment from code that does not need them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.plugins.reward import RewardError, Score
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.rewards.functions import load_reward
from miles_spmd.types.sample import Sample

IMPORT_TIMEOUT = 120.0  # seconds in which a reward function's module must be imported
_VERIFIERS = ("code", "math")  # built-in functions whose time depends on what the response contains
_LOOK_EVERY = 1.0  # seconds between looks at whether a silent process is alive
_BEGUN = "begun"  # what a process sends when it has read a call
_GRACE = 2.0  # seconds that an async function's own timeout has before its process is killed
_PR_SET_PDEATHSIG = 1
_SECRET = re.compile(
    r"(^|_)(TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|API_?KEYS?|KEYS?|AUTH|COOKIES?|PAT|DSN)(_|$)"
)
_LOGIN = re.compile(r"://[^/\s]*:[^/\s]*@")  # a URL with a password


class Function(NamedTuple):
    """A reward function that the processes of a pool import."""

    rm_type: str
    batched: bool


class RewardProcess:
    """The pool's side, used by one thread at a time. A process that has ended is replaced in the next call.

    It dies with the thread that has started it. What it prints goes to ``log``.
    """

    def __init__(self, config: RewardConfig, functions: Sequence[Function], log: Path | None = None) -> None:
        self._config, self._functions, self._log = config, functions, log
        self._killed, self._lock = False, threading.Lock()
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        code = f"from miles_spmd.rewards.process import serve; serve({theirs.fileno()}, {os.getpid()})"
        with contextlib.ExitStack() as stack:
            output = None if self._log is None else stack.enter_context(self._log.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=without_secrets(os.environ, self._config.reward_environment),
            )
        theirs.close()
        self._pipe.send((self._config, self._functions))
        self._grouped: list[bool] | None = None

    def scores_groups(self, function: Function) -> bool:
        """Wait until all functions are imported and return whether calls of this one are of whole groups. Raises
        RewardError if one cannot be imported or called."""
        if self._grouped is None:
            try:
                self._grouped = self._exchange(IMPORT_TIMEOUT)
            except (TimeoutError, EOFError) as error:
                names = ", ".join(repr(one.rm_type) for one in self._functions)
                problem = f"was not imported within {IMPORT_TIMEOUT:g} s, or its import ended the process ({error})"
                raise RewardError(f"reward.rm_type = {names} {problem}; import its module by itself") from error
        return self._grouped[self._functions.index(function)]

    def score(self, function: Function, samples: list[Sample], *, attempts: int = 3) -> list[Score]:
        """Call the reward function once. Raises BadReward, and RewardError where it can no longer be imported.

        A process that ends before it has read the call was idle, and the call goes to another one."""
        with self._lock:
            if self._process.poll() is not None and not self._killed:
                self._start()
        verifies = function.rm_type in _VERIFIERS
        # an async function has a timeout of its own, which gives the better message
        timeout = self._config.reward_timeout + (_GRACE if self.scores_groups(function) else 0)
        try:
            scores: list[Score] = self._exchange(timeout, (self._functions.index(function), samples))
            # its mean is then the share of responses whose verification was killed
            return [Score(one.value, {**one.detail, "killed": 0.0}) for one in scores] if verifies else scores
        except TimeoutError:
            problem = f"took longer than reward.reward_timeout = {self._config.reward_timeout:g} s"
        except EOFError as error:
            if not self._begun and attempts > 1:
                return self.score(function, samples, attempts=attempts - 1)
            problem = f"ended its process ({error})"
        if verifies:  # what cannot be verified in time and memory is wrong
            return [Score(0.0, {"killed": 1.0}) for _ in samples]
        raise BadReward(problem, samples[0].index if len(samples) == 1 else None)

    def _exchange(self, timeout: float, *messages: Any) -> Any:
        """Send, and return or raise the reply. A process that neither reads nor replies in time is killed."""
        self._begun = False
        end = time.monotonic() + timeout
        timer = threading.Timer(timeout, self._end)
        timer.start()
        try:
            for message in messages:
                self._pipe.send(message)
            while (reply := self._receive()) == _BEGUN:
                self._begun = True
        except (EOFError, OSError):
            late, status = time.monotonic() >= end, self._process.wait()
            if self._killed:
                raise CancelledError from None
            raise TimeoutError(f"after {timeout:g} s") if late else EOFError(_meaning(status)) from None
        finally:
            timer.cancel()
            if time.monotonic() >= end:  # the timer may be killing it: the next call must not take it for alive
                self._end()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _receive(self) -> Any:
        while not self._pipe.poll(_LOOK_EVERY):
            if self._process.poll() is not None and not self._pipe.poll():
                raise EOFError  # and another process holds the pipe open
        return self._pipe.recv()

    def _end(self) -> None:
        """Kill the process, and what the user's function has started in it."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """End the process for good."""
        with self._lock:
            self._killed = True
        self._end()


def without_secrets(environment: Mapping[str, str], allowed: Sequence[str] = ()) -> dict[str, str]:
    """Return the variables whose name and value do not look like a secret, and those that are ``allowed``."""
    return {
        name: value
        for name, value in environment.items()
        if name in allowed or not (_SECRET.search(name.upper()) or _LOGIN.search(value))
    }


def _meaning(status: int) -> str:
    return f"exit code {status}" + (f", killed by {signal.Signals(-status).name}" if status < 0 else "")


# --- inside the process ----------------------------------------------------------------------------------------------


def serve(descriptor: int, parent: int) -> None:
    """Import the reward functions, set this process's limits, and score what comes through the pipe."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed controller leaves no process behind
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # which may reach all processes of a run, to stop it with care
        signal.signal(number, lambda *_: None)  # and which programs that the function starts do not ignore
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    pipe = Connection(descriptor)
    os.set_inheritable(descriptor, False)  # a program or fork of the user's would keep the pipe open
    os.register_at_fork(after_in_child=pipe.close)
    with contextlib.suppress(EOFError):
        config: RewardConfig
        config, functions = pipe.recv()
        try:
            rewards = [load_reward(*function) for function in functions]
        except PlugPointError as error:
            pipe.send(RewardError(f"{error}\n{traceback.format_exc()}" if error.__cause__ else str(error)))
            return
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = min(used + int(config.reward_memory_gib * 2**30), sys.maxsize)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send([reward.scores_groups for reward in rewards])
        while True:
            try:
                index, samples = pipe.recv()
                pipe.send(_BEGUN)
                pipe.send(rewards[index].score(samples, config.reward_timeout))
            except BadReward as error:
                pipe.send(error)
            except MemoryError:
                pipe.send(BadReward("ran out of the memory that reward.reward_memory_gib allows"))
