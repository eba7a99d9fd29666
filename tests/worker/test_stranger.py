"""A process of another user on the node of a run: what it can reach, and that nothing comes of what it sends.

Real runs. Where the tests run as root the stranger has another user's number, otherwise only its network access is
tried.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import zmq
from torch.distributed import distributed_c10d

from miles_spmd.platform.plain_objects import PlainUnpickler, accept_plain_objects_only
from miles_spmd.protocol import last_words
from miles_spmd.protocol.messages import Heartbeat, encode
from miles_spmd.protocol.pipe import make_keys
from miles_spmd.protocol.router import address_towards
from miles_spmd.types.phase import Phase
from miles_spmd.worker.meeting import FOLDER, PREFIX, Place, _agree, _given_folder, made_by_launcher
from tests import forked
from tests.ranks import Ranks, free_port
from tests.worker.launched import END_SECONDS, START_SECONDS, Launched
from tests.worker.tiny_run import REFERENCE_ENGINE, write_config

NOBODY = 65534
Address = tuple[str, int]


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def settings(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"rollout": {"engine": REFERENCE_ENGINE}, "determinism": {"parity": "off"}} | changes


# --- the stranger ----------------------------------------------------------------------------------------------------


def as_stranger(act: Callable[..., None], *args: Any) -> list[str]:
    """Do it in a process of another user. Returns what it reports."""
    context = multiprocessing.get_context("fork")
    reports = context.SimpleQueue()

    def run() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        act(reports.put, *args)
        reports.put(None)

    process = context.Process(target=run)
    process.start()
    found = list(iter(reports.get, None))
    process.join()
    return found


def attack(report: Callable[[str], None], addresses: list[Address], processes: list[int], payload: bytes) -> None:
    """Send everything to everyone."""
    if os.getuid():
        for pid in processes:
            for file in ("environ", "mem"):
                with contextlib.suppress(OSError):
                    os.close(os.open(f"/proc/{pid}/{file}", os.O_RDONLY))
                    report(f"it reads {file} of a process")
        for folder in Path("/tmp").glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                os.listdir(folder)
                if folder.stat().st_uid != os.getuid():  # it may have runs of its own
                    report(f"it reads {folder}")
    with ThreadPoolExecutor(16) as pool:
        for address in addresses:
            pool.submit(garbage, address, payload)
            pool.submit(write_into_a_store, report, address, payload)
    frames(addresses)


def garbage(address: Address, payload: bytes) -> None:
    sequence = [number.to_bytes(8, "little") for number in range(4)]  # by which gloo tells connections apart
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE".ljust(54, b"\0")  # of ZMQ's protocol
    large = greeting + b"\x06" + (2**62).to_bytes(8, "big")
    for data in (
        b"",
        payload,
        os.urandom(10_000),
        greeting + payload,
        large + payload,
        *(number + payload for number in sequence),
    ):
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1) as connection:
            connection.sendall(data)


def write_into_a_store(report: Callable[[str], None], address: Address, payload: bytes) -> None:
    limit = timedelta(seconds=0.3)
    with contextlib.suppress(RuntimeError, dist.DistNetworkError, dist.DistStoreError):
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=limit)
        store.set("torch.rendezvous.none", payload)
        report(f"it writes into the store at {address}")


def frames(addresses: list[Address]) -> None:
    context = zmq.Context()
    sockets = []
    for address in addresses:
        for keys in (None, make_keys()):
            client = context.socket(zmq.DEALER)
            client.linger = 0
            if keys:
                client.curve_serverkey, client.curve_publickey, client.curve_secretkey = (
                    key.encode() for key in (make_keys()[0], *keys)
                )
            client.connect(f"tcp://{address[0]}:{address[1]}")
            client.send(encode(Heartbeat(0, Phase.STOP, 0, "stopped by a stranger")))
            sockets.append(client)
    time.sleep(0.3)
    for client in sockets:
        client.close()
    context.term()


def listening(processes: list[int]) -> list[Address]:
    found = []
    for pid in processes:
        with contextlib.suppress(psutil.Error):
            connections = psutil.Process(pid).net_connections("inet")
            found += [
                tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN or c.type == socket.SOCK_DGRAM
            ]
    return found


# --- one node --------------------------------------------------------------------------------------------------------


def test_a_stranger_on_the_node_changes_nothing(tmp_path: Path, checkpoint: Path) -> None:
    steps = 60
    run = Launched(tmp_path, write_config(tmp_path, checkpoint, **settings(run={"name": "tiny", "num_rollout": steps})))
    try:
        run._wait_for(lambda: (run.run_dir / "metrics.jsonl").exists(), START_SECONDS)
        processes = run.processes()
        addresses = listening(processes)
        assert len(addresses) > 2
        assert {address for address, _ in addresses} == {"127.0.0.1"}
        meetings = {psutil.Process(pid).environ().get(FOLDER, "") for pid in processes} - {""}
        assert len(meetings) == 1
        assert not Path(meetings.pop(), "keys.json").exists(), "deleted when all have read it"
        marker = tmp_path / "code has run"
        reports = as_stranger(attack, addresses, processes, pickle.dumps(Code(marker)))
        assert not reports
        assert run.launcher.wait(END_SECONDS + START_SECONDS) == 0, run.report()
        assert not marker.exists()
        assert "miles-spmd: " not in run.stderr()
        lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == steps
    finally:
        run.clean_up()
    assert not run.processes()


def test_torchruns_own_store_grants_nothing(tmp_path: Path, checkpoint: Path) -> None:
    """Under ``torchrun --standalone`` its store is open to everyone. The ranks use it for a folder's name alone."""
    config = write_config(tmp_path, checkpoint, **settings())
    run = Launched(tmp_path, config, Phase.START, "0", "hang")
    try:
        run.wait_until_held()
        ranks = run.wait_for_ranks()
        ports = {port for _, port in listening([run.launcher.pid])}
        assert {address for address, port in listening(ranks) if port not in ports} == {"127.0.0.1"}
        values: dict[str, bytes] = {}
        for port in ports:
            limit = timedelta(seconds=5)
            store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
            values |= {key: store.get(key) for key in store.list_keys()}  # type: ignore[attr-defined]
        meeting = [value for key, value in values.items() if key.endswith("meeting")]
        assert len(meeting) == 1
        folder = Path(os.environ.get("TMPDIR", "/tmp"), meeting[0].decode())
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not any(b"tcp://" in value or b"secret" in value for value in values.values())
    finally:
        run.clean_up()


# --- the folder in which ranks meet ----------------------------------------------------------------------------------


def foreign(folder: Path) -> None:
    folder.mkdir(0o700)
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    else:
        folder.chmod(0o750)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (f"{PREFIX}open", lambda folder: (folder.mkdir(), folder.chmod(0o755))),
        (f"{PREFIX}foreign", foreign),
        (f"{PREFIX}link", lambda folder: folder.symlink_to(folder.parent)),
        (f"{PREFIX}file", lambda folder: folder.touch(0o600)),
        ("../elsewhere", lambda folder: None),
        ("/tmp", lambda folder: None),
        (f"{PREFIX}\x1b[2J", lambda folder: None),
    ],
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_folder_that_is_not_private_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], None], nodes: int
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make(tmp_path / name)
    store = dist.HashStore()
    store.set("meeting", name)
    with pytest.raises(RuntimeError, match="is not this user's alone: another process has written") as caught:
        _agree(Place(1, 2, 0, 2 // nodes, ""), tmp_path, store, time.monotonic())
    assert "\x1b" not in str(caught.value)


def test_nodes_without_a_shared_run_folder_are_told_so(tmp_path: Path) -> None:
    store = dist.HashStore()
    store.set("meeting", f"{PREFIX}abc")
    with pytest.raises(
        TimeoutError, match=r"rank 1 does not see .*abc, .*: run.output_dir has to be a folder that all"
    ):
        _agree(Place(1, 2, 0, 1, ""), tmp_path, store, time.monotonic() + 0.1)


@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_without_torchrun_meet(tmp_path: Path, checkpoint: Path, nodes: int) -> None:
    """As srun starts them, on one node or, in the run folder, on two; both of them are this machine."""
    config, port, seen = write_config(tmp_path, checkpoint, **settings()), free_port(), set[int]()
    variables = os.environ | {"MASTER_ADDR": "127.0.0.1" if nodes == 2 else socket.gethostname()}
    variables |= {"MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(2 // nodes), "LOCAL_RANK": "0"}
    variables |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = ["-m", "miles_spmd", "train", str(config)]
    started = [
        forked.start(command, tmp_path, variables | {"RANK": rank}, tmp_path / f"out{rank}", tmp_path / f"err{rank}")
        for rank in "01"
    ]
    run_dir, end = tmp_path / "runs" / "tiny", time.monotonic() + START_SECONDS
    while any(rank.poll() is None for rank in started) and time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            seen |= {stat.S_IMODE(path.stat().st_mode) for path in run_dir.glob(f"{PREFIX}*")}
            seen |= {stat.S_IMODE(path.stat().st_mode) for path in run_dir.glob(f"{PREFIX}*/keys.json")}
        time.sleep(0.005)
    said = "".join((tmp_path / f"err{rank}").read_text() for rank in "01")
    assert [rank.wait(1) for rank in started] == [0, 0], said
    assert seen <= {0o700, 0o600}
    assert not [*run_dir.glob(f"{PREFIX}*")], "nothing of it is left"


def test_a_run_started_by_a_rank_has_a_meeting_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    place = Place(0, 1, 0, 1, "")
    assert (_given_folder(place), _given_folder(place)) == (tmp_path, None)


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("localhost", True), ("no such host.invalid", False)])
def test_the_address_towards_a_host(host: str, local: bool) -> None:
    assert address_towards(host) == ("127.0.0.1" if local else None)


# --- pickles ---------------------------------------------------------------------------------------------------------


def plain(data: object) -> Any:
    return PlainUnpickler(io.BytesIO(pickle.dumps(data))).load()


def test_plain_data_is_unpickled() -> None:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

    chunk = ChunkStorageMetadata(torch.Size([1]), torch.Size([2]))
    for value in (
        {"a": [1, 2.5, None, b"x", {3}, (True,)]},
        SavePlan([]),
        WriteItemType.BYTE_IO,
        MetadataIndex("x"),
        [torch.float32, torch.strided, chunk, Path("a/b")],
    ):
        assert plain(value) == value
    assert torch.equal(plain(torch.arange(5)), torch.arange(5))
    for error in (OSError(28, "No space left on device"), torch.OutOfMemoryError("all")):
        assert repr(plain(error)) == repr(error)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(b"cos\nsystem\n(S'true'\ntR.", id="os.system"),
        pytest.param(b"cbuiltins\neval\n(S'1'\ntR.", id="eval"),
        pytest.param(b"cbuiltins\ngetattr\n.", id="getattr"),
        pytest.param(
            b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.", id="a dotted name"
        ),
        pytest.param(b"ctorch.distributed.checkpoint.filesystem\nos\n.", id="a module in a module"),
        pytest.param(b"ctorch\nload\n.", id="torch.load"),
        pytest.param(b"csubprocess\nPopen\n(S'true'\ntR.", id="Popen"),
    ],
)
def test_code_is_not_unpickled(code: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="is not among the types that ranks exchange"):
        PlainUnpickler(io.BytesIO(code)).load()


def exchange(marker: Path) -> str:
    before = distributed_c10d._unpickler
    accept_plain_objects_only()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ["plain", dist.get_rank()])
    assert everyone == [["plain", 0], ["plain", 1]]
    try:
        dist.all_gather_object(everyone, Code(marker) if dist.get_rank() else None)
    except pickle.UnpicklingError as error:
        return str(error)
    finally:
        distributed_c10d._unpickler = before  # these ranks serve other tests, which send objects of their own
    return "unpickled"


def test_a_rank_runs_no_code_that_another_sends(ranks: Ranks, tmp_path: Path) -> None:
    marker = tmp_path / "code has run"
    assert all("posix.mkdir is not among" in answer for answer in ranks.run(2, exchange, marker))
    assert not marker.exists()


HOLD = """
from miles_spmd.worker.meeting import made_by_launcher
with made_by_launcher() as folder:
    print(folder, flush=True)
    input()
"""
SPEAK = """
from miles_spmd.protocol import last_words
last_words.keep()
print("keeps it", flush=True)
input()
last_words.say("the launcher died")
input()
"""


def program(source: str, **variables: str) -> subprocess.Popen[str]:
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", source], env=os.environ | variables, text=True, **streams)


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_what_killed_launchers_have_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launcher() -> tuple[subprocess.Popen[str], Path]:
        process = program(HOLD, TMPDIR=str(tmp_path))
        return process, Path(told(process))

    (tmp_path / f"{PREFIX}kernels").mkdir()
    (killed, left), (living, used) = launcher(), launcher()
    killed.kill()
    killed.wait()
    assert left.is_dir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with made_by_launcher() as folder:
        assert {path.name for path in tmp_path.iterdir()} == {used.name, folder.name, f"{PREFIX}kernels"}
        assert folder.stat().st_mode & 0o777 == 0o700
    living.communicate("\n")
    assert living.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}kernels"]


def test_a_process_may_say_why_its_launcher_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run begins meanwhile."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launcher = program(HOLD, TMPDIR=str(tmp_path))
    left = Path(told(launcher))
    unsaid = left / "unsaid"
    unsaid.touch()
    speaker, other = (program(SPEAK, **{last_words.VARIABLE: str(unsaid)}) for _ in range(2))
    assert told(speaker) == told(other) == "keeps it"
    launcher.kill()
    launcher.wait()
    with made_by_launcher():
        assert left.is_dir()
    assert speaker.stdin is not None
    speaker.stdin.write("\n")
    speaker.stdin.flush()
    assert told(speaker) == "miles-spmd: the launcher died"
    assert other.communicate("\n\n")[0] == ""
    speaker.communicate("\n")
    with made_by_launcher():
        assert not left.exists()
