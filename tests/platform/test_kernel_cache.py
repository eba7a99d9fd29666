"""Where compiled kernels are kept: the node's private folder and the archive that nodes share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from miles_spmd.platform import kernel_cache
from miles_spmd.platform.kernel_cache import FOLDERS, KernelCache


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FOLDERS, "PYTHONPYCACHEPREFIX"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is a node whose own disk is ``folder``."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(folder))
    for name in FOLDERS:
        os.environ.pop(name, None)


def opened(shared: Path, device: str = "H200 9.0") -> KernelCache:
    cache = KernelCache(shared, device)
    cache.open()
    return cache


def compile_something(name: str) -> Path:
    """Do what Triton does: a folder with a kernel, and a group that names it by its whole path."""
    folder = Path(os.environ["TRITON_CACHE_DIR"], name)
    folder.mkdir(parents=True)
    kernel = folder / "kernel.cubin"
    kernel.write_bytes(b"code of " + name.encode())
    (folder / "__grp__kernel.json").write_text(json.dumps({"child_paths": {"kernel.cubin": str(kernel)}}))
    (folder / "lock").touch()
    return kernel


def test_what_one_node_compiled_another_one_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    node(tmp_path / "a", monkeypatch)
    first = opened(shared)
    assert first.folder.stat().st_mode & 0o777 == 0o700
    kernel = compile_something("one")
    Path(os.environ["TRITON_CACHE_DIR"], "tmp.pid_1").mkdir()
    Path(os.environ["TRITON_CACHE_DIR"], "tmp.pid_1", "half").touch()
    assert (first.compiled, first.unpacked) == (1, 0)
    first.fill(wait=True)
    assert first.archive.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in shared.iterdir()] == [first.archive.name]
    written = first.archive.stat().st_mtime_ns
    first.fill(wait=True)  # nothing is new
    assert first.archive.stat().st_mtime_ns == written

    node(tmp_path / "b", monkeypatch)
    second = opened(shared)
    assert (second.compiled, second.unpacked, second.problems) == (0, 2, [])
    copy = Path(os.environ["TRITON_CACHE_DIR"], "one")
    assert sorted(path.name for path in copy.iterdir()) == ["__grp__kernel.json", "kernel.cubin"]
    assert copy.joinpath("kernel.cubin").read_bytes() == b"code of one"
    assert copy.joinpath("kernel.cubin").stat().st_mtime_ns // 10**9 == kernel.stat().st_mtime_ns // 10**9
    group = json.loads(copy.joinpath("__grp__kernel.json").read_text())
    assert group == {"child_paths": {"kernel.cubin": str(copy / "kernel.cubin")}}
    compile_something("two")
    second.fill(wait=True)
    with tarfile.open(second.archive) as archive:
        assert {"triton/one/kernel.cubin", "triton/two/kernel.cubin"} <= set(archive.getnames())
    assert opened(shared).unpacked == 0  # the node's folder is there


def test_another_gpu_and_another_version_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node(tmp_path, monkeypatch)
    keys = {KernelCache(tmp_path, device).key for device in ("H200 9.0", "B200 10.0")}
    monkeypatch.setattr(kernel_cache.importlib.metadata, "version", lambda name: "0")
    keys |= {KernelCache(tmp_path, "H200 9.0").key, KernelCache(tmp_path, "H200 9.0", "engines").key}
    assert len(keys) == 4


def test_a_users_own_variables_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node(tmp_path, monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("DG_JIT_CACHE_DIR", "/mine, too")
    cache = opened(tmp_path / "shared")
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert "SGLANG_DG_CACHE_DIR" not in os.environ  # SGLang would overwrite the other one with it
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.folder / "inductor")


@pytest.mark.parametrize("damage", ["link", "open", "file"])
def test_a_folder_that_others_can_enter_is_not_used(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node(tmp_path, monkeypatch)
    place = KernelCache(tmp_path / "shared", "H200 9.0").folder.parent
    if damage == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    elif damage == "open":
        place.mkdir()
        place.chmod(0o770)
    else:
        place.touch()
    cache = opened(tmp_path / "shared")
    (problem,) = cache.problems
    assert "is not a folder of this user's alone; remove it, or set TMPDIR" in problem
    assert "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("damage", ["writable", "cut 700", "cut 1024", "cut 1500", "cut 2560", "escape"])
def test_an_archive_that_cannot_be_trusted_or_read_is_not_unpacked(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    node(tmp_path / "a", monkeypatch)
    cache = opened(shared)
    compile_something("one")
    cache.fill(wait=True)
    if damage == "writable":
        cache.archive.chmod(0o620)
    elif damage.startswith("cut"):
        cache.archive.write_bytes(cache.archive.read_bytes()[: int(damage.split()[1])])
    else:
        with tarfile.open(cache.archive, "w") as archive:
            archive.add(__file__, "../../escaped")
    node(tmp_path / "b", monkeypatch)
    cache = opened(shared)
    (problem,) = cache.problems
    assert str(cache.archive) in problem
    assert cache.unpacked == 0
    assert not list(cache.folder.rglob("*"))
    assert not list(tmp_path.rglob("escaped"))
    compile_something("two")
    cache.fill(wait=True)  # a good one takes its place
    assert cache.archive.stat().st_mode & 0o777 == 0o600


def test_many_ranks_at_once_unpack_once_and_write_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes: of two nodes, four each."""
    shared = tmp_path / "shared"
    node(tmp_path / "a", monkeypatch)
    cache = opened(shared)
    for number in range(20):
        compile_something(f"kernel-{number}")
    cache.fill(wait=True)
    program = (
        "import sys; from pathlib import Path; from miles_spmd.platform.kernel_cache import KernelCache\n"
        "cache = KernelCache(Path(sys.argv[1]), 'H200 9.0'); cache.open()\n"
        "assert len(list(cache.folder.glob('triton/*/kernel.cubin'))) == 20\n"
        "(cache.folder / 'triton' / sys.argv[2]).touch(); cache.fill(wait=True)\n"
        "print(cache.unpacked, cache.problems)"
    )
    ranks = []
    for rank in range(8):
        disk = tmp_path / f"node-{rank // 4}"
        disk.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in FOLDERS} | {"TMPDIR": str(disk)}
        command = [sys.executable, "-c", program, str(shared), str(rank)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=200)[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 8
    for of_node in (said[:4], said[4:]):
        *others, one = sorted(int(line.removesuffix(" []")) for line in of_node)
        assert others == [0, 0, 0]
        assert 40 <= one < 48  # of two files each, and what ranks before had added
    assert [path.name for path in shared.iterdir()] == [cache.archive.name]
    with tarfile.open(cache.archive) as archive:
        assert sum(name.endswith("kernel.cubin") for name in archive.getnames()) == 20


def test_a_copy_that_was_begun_by_a_dead_process_does_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node(tmp_path / "a", monkeypatch)
    cache = opened(tmp_path / "shared")
    compile_something("one")
    begun = cache.archive.with_suffix(".writing")
    begun.parent.mkdir()
    begun.touch()
    cache.fill(wait=True)  # somebody is writing
    assert not cache.archive.exists()
    os.utime(begun, (1, 1))
    cache.fill(wait=True)
    assert cache.archive.exists()
    assert not begun.exists()
