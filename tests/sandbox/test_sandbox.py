"""What an execution gets and leaves, and what is reported where no sandbox can be made."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles_spmd.sandbox import sandbox as module
from miles_spmd.sandbox.sandbox import Limits, Outcome, Problem, Sandbox, SandboxError


def test_a_program_gets_input_files_and_arguments(sandbox: Sandbox) -> None:
    program = "import sys, helper; print(helper.twice(sys.stdin.read()), sys.argv, open('a/b.txt').read(), __name__)"
    files = {"helper.py": "twice = lambda text: text * 2", "a/b.txt": b"content"}
    outcome = sandbox.run(program, "in", files, ["x", "--y"])
    assert outcome.stdout == "inin ['main.py', 'x', '--y'] content __main__\n"
    assert (outcome.stderr, outcome.status, outcome.problem) == ("", 0, Problem.OK)


def test_large_input_and_output_pass_at_the_same_time() -> None:
    text = "0123456789abcde\n" * 2**17  # more than a pipe holds
    outcome = Sandbox(Limits(output_bytes=len(text))).run(
        "import sys\nfor line in sys.stdin: print(line, end='')", text
    )
    assert outcome.stdout == text
    assert Sandbox().run("print('did not read')", text).stdout == "did not read\n"


@pytest.mark.parametrize(
    ("program", "status", "problem"),
    [
        ("", 0, Problem.OK),
        ("raise SystemExit(3)", 3, Problem.ERROR),
        ("1 / 0", 1, Problem.ERROR),
        ("what is this", 1, Problem.ERROR),
        ("import os; os._exit(0)", 0, Problem.OK),
        ("import os; os.abort()", 134, Problem.KILLED),
        ("import os; os.kill(os.getpid(), 9)", 137, Problem.KILLED),
        ("raise MemoryError", 1, Problem.MEMORY),
        ("'\ud800'", 1, Problem.ERROR),
        ("import sys; sys.stderr.write('bwrap: no permissions'); sys.exit(1)", 1, Problem.ERROR),
    ],
)
def test_why_a_program_ended(sandbox: Sandbox, program: str, status: int, problem: Problem) -> None:
    outcome = sandbox.run(program)
    assert (outcome.status, outcome.problem) == (status, problem)


def test_executions_do_not_see_each_other(sandbox: Sandbox) -> None:
    program = "import os; print(sorted(os.listdir())); open('left', 'w')"
    assert [sandbox.run(program).stdout for _ in range(2)] == ["['main.py']\n"] * 2


def test_the_same_program_prints_the_same(sandbox: Sandbox) -> None:
    assert len({sandbox.run("print({'a', 'b', 'c', 'd', 'e', 'f'})").stdout for _ in range(3)}) == 1


def test_packages_are_hidden_unless_asked_for(sandbox: Sandbox) -> None:
    program = "import numpy; print(numpy.arange(3).sum())"
    assert "ModuleNotFoundError" in sandbox.run(program).stderr
    assert Sandbox(packages=True).run(program).stdout == "3\n"
    listed = """
import glob, sys
print([glob.glob(f"{prefix}/lib/python3*/*-packages/*") for prefix in (sys.prefix, "/usr")])
"""
    assert sandbox.run(listed).stdout == "[[], []]\n"


def test_threads_and_processes_of_the_program_work(sandbox: Sandbox) -> None:
    program = """
import multiprocessing, threading
threading.Thread(target=print, args=("thread",)).start()
with multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1, -2]))
"""
    assert sandbox.run(program).stdout == "thread\n[1, 2]\n"


def test_limits_of_this_process_are_not_exceeded() -> None:
    """As in a process of the reward pool, whose address space is limited."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from miles_spmd.sandbox.sandbox import *\n"
        "limits = 'import resource; print(resource.getrlimit(resource.RLIMIT_AS))'\n"
        "print(Sandbox(Limits(memory_mib=4096)).run(limits).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str((2**30, 2**30)), done.stderr
    with pytest.raises(ValueError, match="memory_mib must be positive, got 0"):
        Limits(memory_mib=0)
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY


def test_asynchronous_executions_run_at_the_same_time(sandbox: Sandbox) -> None:
    async def several() -> list[Outcome]:
        return await asyncio.gather(*(sandbox.run_async("import time; time.sleep(2); print(1)") for _ in range(4)))

    start = time.monotonic()
    assert [one.stdout for one in asyncio.run(several())] == ["1\n"] * 4
    assert time.monotonic() - start < 7  # one after the other would be 8


def test_a_cancelled_execution_is_killed(sandbox: Sandbox) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(sandbox.run_async("import time; time.sleep(15)"))
        await asyncio.sleep(0.5)
        task.cancel()
        await task

    start = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())  # waits for its threads
    assert time.monotonic() - start < 8


# --- machines without a sandbox --------------------------------------------------------------------------------------


def test_no_bubblewrap_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module._probe.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(SandboxError, match="bwrap is not in PATH: install the package bubblewrap"):
            Sandbox()
    finally:
        module._probe.cache_clear()


def test_an_old_bubblewrap_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module._probe.cache_clear()
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    try:
        assert module.problem() == f"{tmp_path}/bwrap has version 0.4.1: install bubblewrap 0.7 or newer"
    finally:
        module._probe.cache_clear()


def test_an_interpreter_that_holds_the_home_directory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was installed with the home directory as its prefix."""
    venv = Path(sys.prefix).resolve()
    monkeypatch.setenv("HOME", str(venv / "lib"))
    with pytest.raises(SandboxError, match=f"the interpreter's folder {venv} contains your home directory"):
        Sandbox(packages=True)
    Sandbox()  # it does not show the virtual environment
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.chdir(venv)
    with pytest.raises(SandboxError, match="contains your working directory"):
        Sandbox(packages=True)


def in_container(*options: str) -> str:
    """Return what a container with these options of bubblewrap has: the problem, and what the sandbox prints there."""
    program = (
        "from miles_spmd.sandbox.sandbox import *\nprint(problem())\n"
        "print(Sandbox().run('import os; print(os.path.exists(\"/proc\"))'))"
    )
    line = [str(shutil.which("bwrap")), "--dev-bind", "/", "/", *options, "--", sys.executable, "-c", program]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout


def test_forbidden_user_namespaces_are_an_error() -> None:
    found = in_container("--unshare-user", "--disable-userns")
    assert "namespace" in found
    assert "user.max_user_namespaces" in found
    assert found.count("\n") == 1


def test_a_container_with_a_covered_proc_has_a_sandbox_without() -> None:
    covered = ("--unshare-pid", "--proc", "/proc", "--tmpfs", "/proc/fs", "--ro-bind", "/proc/sys", "/proc/sys")
    found = in_container(*covered)
    assert found.startswith("None\nOutcome(stdout='False\\n'"), found


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel makes this exception for root")
def test_root_whose_processes_are_not_limited_is_an_error() -> None:
    assert in_container("--unshare-user").startswith("the kernel does not limit the processes of root")
