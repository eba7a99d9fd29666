"""Ways out of the sandbox: each program prints "reached" where it gets through, as it does outside the sandbox."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_spmd.sandbox.filter import _CLONE, _CLONE3, _IOCTL, _SOCKET, REFUSED, seccomp_filter
from miles_spmd.sandbox.sandbox import Problem, Sandbox

ROOT = Path(__file__).parents[2]
SECRET = "MILES_SPMD_TEST_SECRET"


def outside(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tried(sandbox: Sandbox, attempt: str) -> str:
    """Return what becomes of an attempt that raises an OSError where it is refused."""
    program = f"try:\n    {attempt}\n    print('reached')\nexcept OSError as error:\n    print(type(error).__name__)"
    assert outside(program) == "reached\n"
    outcome = sandbox.run(program)
    assert outcome.problem is Problem.OK, outcome.stderr
    return outcome.stdout.strip()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("a secret")
    return file


@pytest.fixture
def server() -> Iterator[tuple[int, str]]:
    """The port of a TCP server on the loopback interface, and the name of one on an abstract UNIX socket."""
    name = f"\0miles-spmd-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(name)
        unix.listen()
        yield tcp.getsockname()[1], name


def test_files_of_the_host_cannot_be_read(sandbox: Sandbox, secret: Path) -> None:
    for path in (secret, ROOT / "pyproject.toml", Path("/etc/passwd"), Path(f"/proc/{os.getpid()}/environ")):
        assert tried(sandbox, f"open({str(path)!r}).read()") == "FileNotFoundError"


def test_folders_of_the_host_cannot_be_listed(sandbox: Sandbox) -> None:
    for path in ("/sys/kernel", "/proc/self/root/etc", "/home", "/var", "/run"):
        refused = tried(sandbox, f"__import__('os').listdir({path!r})")
        assert refused in ("FileNotFoundError", "PermissionError"), path
    seen = sandbox.run(
        f"import os; home = {str(Path.home())!r}; print(*os.listdir(home) if os.path.isdir(home) else [])"
    )
    assert set(seen.stdout.split()) <= set(Path(sys.base_prefix).resolve().parts)  # the interpreter may lie there


def test_nothing_but_the_working_directory_can_be_written(sandbox: Sandbox, secret: Path) -> None:
    assert tried(sandbox, f"open({str(secret)!r}, 'w').write('')") == "FileNotFoundError"
    program = """
import os
found = []
for folder, _, _ in os.walk("/"):
    if not folder.startswith(("/proc", "/tmp", "/dev/shm")):
        try:
            os.close(os.open(folder + "/x", os.O_CREAT | os.O_WRONLY)); found.append(folder)
        except OSError: pass
print(found)
"""
    assert sandbox.run(program).stdout == "[]\n"


def test_settings_of_the_kernel_cannot_be_written(sandbox: Sandbox) -> None:
    program = """
for path in ("sys/kernel/hostname", "sys/kernel/core_pattern", "sys/user/max_user_namespaces", "sysrq-trigger"):
    try:
        open("/proc/" + path, "w").write("1"); print("written", path)
    except OSError as error:
        print(type(error).__name__)
"""
    assert set(sandbox.run(program).stdout.split()) <= {"PermissionError", "OSError", "FileNotFoundError"}


def test_the_network_cannot_be_reached(sandbox: Sandbox, server: tuple[int, str]) -> None:
    port, name = server
    assert (
        tried(sandbox, f"__import__('socket').create_connection(('127.0.0.1', {port}), 5)") == "ConnectionRefusedError"
    )
    unix = f"s = __import__('socket'); s.socket(s.AF_UNIX).connect({name!r})"
    assert tried(sandbox, unix) == "ConnectionRefusedError"
    assert "gaierror" in sandbox.run("import socket; socket.getaddrinfo('example.com', 80)").stderr
    assert "unreachable" in sandbox.run("import socket; socket.create_connection(('192.0.2.1', 80), 5)").stderr


def test_processes_of_the_host_are_neither_seen_nor_signalled(sandbox: Sandbox) -> None:
    with subprocess.Popen(["sleep", "60"]) as victim:
        try:
            kill = f"import os; os.kill({victim.pid}, 15)"
            assert "ProcessLookupError" in sandbox.run(kill).stderr
            assert victim.poll() is None
            outside(kill)
            assert victim.wait(10) == -signal.SIGTERM
        finally:
            victim.kill()
    numbers = "import os; print(*sorted(int(n) for n in os.listdir('/proc') if n.isdigit()))"
    assert sandbox.run(numbers).stdout == "1 2\n"  # the sandbox's own init, and the program


def test_the_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "hunter2")
    program = f"""
import glob, os
seen = [os.environ.get({SECRET!r})]
for file in glob.glob("/proc/[0-9]*/environ"):
    try: seen.append(open(file, "rb").read())
    except OSError: pass
print("hunter2" in str(seen))
"""
    assert outside(program) == "True\n"
    assert sandbox.run(program).stdout == "False\n"


def test_no_descriptor_is_inherited(sandbox: Sandbox, secret: Path) -> None:
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        program = "import os; print(sorted(int(fd) for fd in os.listdir('/proc/self/fd')))"
        assert sandbox.run(program).stdout == "[0, 1, 2, 3]\n"  # 3 is the listing's own


def test_nothing_gains_privileges(sandbox: Sandbox) -> None:
    program = """
import os, shutil, subprocess
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(status["NoNewPrivs"], *{int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")})
shutil.copy("/usr/bin/id", "id"); os.chmod("id", 0o6755)
print(subprocess.run(["./id", "-u"], capture_output=True, text=True).stdout.strip(), os.getuid())
print(bool(os.statvfs("/usr").f_flag & os.ST_NOSUID))
for change in (os.setuid, os.setgid):
    try:
        change(0); print("changed")
    except OSError as error: print(error.strerror)
"""
    assert sandbox.run(program).stdout.split("\n")[:3] == ["1 0", "65534 65534", "True"]
    assert "changed" not in sandbox.run(program).stdout


def test_links_in_the_files_lead_nowhere(sandbox: Sandbox, secret: Path) -> None:
    for name in ("/etc/x", "../x", "a/../../x", "a/..", "", ".", "x\0y"):
        with pytest.raises(ValueError, match="relative path without"):
            sandbox.run("", files={name: "x"})
    with pytest.raises(ValueError, match=r"main\.py"):
        sandbox.run("", files={"./main.py": "x"})
    link = f"import os; os.symlink({str(secret)!r}, 'link'); print(os.path.exists('link'))"
    assert sandbox.run(link).stdout == "False\n"


# --- system calls ----------------------------------------------------------------------------------------------------

CALL = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(one) for one in arguments))
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""
COLUMN = {"x86_64": 0, "aarch64": 1}[platform.machine()]


def test_system_calls_are_refused(sandbox: Sandbox) -> None:
    numbers = {name: both[COLUMN] for name, both in REFUSED.items() if both[COLUMN] is not None}
    program = f"{CALL}print({{name: call(n, -1, -1, -1, -1, -1, -1) for name, n in {numbers}.items()}})"
    assert eval(sandbox.run(program).stdout) == dict.fromkeys(numbers, "EPERM")


def test_system_calls_are_refused_by_their_arguments(sandbox: Sandbox) -> None:
    clone, clone3, socket_, ioctl = (both[COLUMN] for both in (_CLONE, _CLONE3, _SOCKET, _IOCTL))
    namespaces = [0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000]
    program = f"""{CALL}
print(*(call({clone}, flag | 17, 0, 0, 0, 0) for flag in {namespaces}), call({clone3}, 0, 0))
print(*(call({socket_}, family, 1, 0) for family in (16, 17, 38, 40)), call({socket_}, 2, 1, 0))
import os
_, terminal = os.openpty()
print(*(call({ioctl}, terminal, request, 0) for request in (0x5412, 0x541C)))
"""
    first, second, third = sandbox.run(program).stdout.splitlines()
    assert first.split() == ["EPERM"] * len(namespaces) + ["ENOSYS"]
    assert second.split() == ["EAFNOSUPPORT"] * 4 + ["done"]  # netlink, packet, AF_ALG, AF_VSOCK
    assert third.split() == ["EPERM", "EPERM"]


def test_harmless_ones_succeed_outside() -> None:
    """Or the tests above could not fail."""
    names = ("ptrace", "memfd_create", "unshare", "kcmp")
    ptrace, memfd, unshare, kcmp = (REFUSED[name][COLUMN] for name in names)
    program = f"""{CALL}
import os
name = ctypes.create_string_buffer(b"name")
print(call({memfd}, ctypes.addressof(name), 0), call({unshare}, 0))
print(call({kcmp}, os.getpid(), os.getpid(), 0, 0, 1), call({ptrace}, 0, 0, 0, 0))
"""
    assert outside(program).split() == ["done"] * 4


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its 32-bit calls")
def test_calls_of_another_architecture_kill(sandbox: Sandbox) -> None:
    program = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("b814000000cd80c3"))  # getpid by int 0x80
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""
    outcome = sandbox.run(program)
    assert (outcome.problem, outcome.stdout) == (Problem.KILLED, "")


def test_the_numbers_are_those_of_libseccomp() -> None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not installed")
    compared = 0
    for name, numbers in REFUSED.items() | {
        ("clone", _CLONE),
        ("clone3", _CLONE3),
        ("ioctl", _IOCTL),
        ("socket", _SOCKET),
    }:
        for number, token in zip(numbers, (0xC000003E, 0xC00000B7)):
            known = library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(token), name.encode())
            if known >= 0 or number is None:  # a call that is newer than the library is unknown to it
                assert (number if number is not None else -1) == max(known, -1), name
                compared += 1
    assert compared > 120


def test_only_known_machines_have_a_filter() -> None:
    assert seccomp_filter("x86_64") != seccomp_filter("aarch64")
    with pytest.raises(ValueError, match="riscv64"):
        seccomp_filter("riscv64")
