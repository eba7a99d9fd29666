"""Files on a disk that is full: whole lines or none, and an error that names the file."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from miles_spmd.ledger.chain import Chain
from miles_spmd.ledger.entries import Saved
from miles_spmd.telemetry.trackers import JsonlTracker, TensorBoardTracker
from miles_spmd.types.files import REMEDY, AppendedFile, naming, with_remedy, write_whole
from miles_spmd.worker.log import Log

LIMIT = 1000


@contextmanager
def small_files() -> Iterator[None]:
    """As after ``ulimit -f``: a write past the limit is cut short, and the next one fails. So it is on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def repeat(write: Callable[[int], None]) -> None:
    for step in range(LIMIT):
        write(step)


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = AppendedFile(path)
    file.append(b"first\n")
    with small_files(), pytest.raises(OSError, match="lines") as error:
        file.append(b"x" * LIMIT + b"\n")
    assert with_remedy(str(error.value)) == f"{error.value}; {REMEDY}"
    assert with_remedy(f"{error.value}; {REMEDY}").count(REMEDY) == 1  # a message may pass through several hands
    assert with_remedy("no such file") == "no such file"
    assert path.read_bytes() == b"first\n"
    file.append(b"second\n")
    file.close()
    assert path.read_bytes() == b"first\nsecond\n"


def test_metrics_and_ledger_end_with_a_whole_line(tmp_path: Path) -> None:
    tracker, chain = JsonlTracker(tmp_path / "metrics.jsonl"), Chain(tmp_path, None)
    with small_files():
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            repeat(lambda step: tracker.log(step, {"train/loss": 0.5}))
        with pytest.raises(OSError, match=r"chain\.jsonl"):
            repeat(lambda step: chain.append(Saved(step, {}, {})))
    for file in (tmp_path / "metrics.jsonl", tmp_path / "ledger" / "chain.jsonl"):
        content = file.read_bytes()
        assert LIMIT / 2 < len(content) <= LIMIT
        assert content.endswith(b"}\n")


def test_tensorboard_fails_where_it_writes(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    with small_files(), pytest.raises(OSError, match=r"File too large: '.*/events\.out\.tfevents"):
        repeat(lambda step: tracker.log(step, {"train/loss": 0.5}))
    tracker.close()
    (file,) = tmp_path.iterdir()
    content, steps = file.read_bytes(), []
    while content:  # every record is whole
        length = struct.unpack_from("<Q", content)[0]
        steps.append(Event.FromString(content[12 : 12 + length]).step)
        assert len(content) >= 16 + length
        content = content[16 + length :]
    assert len(steps) > 10
    assert steps == [0, *range(len(steps) - 1)]


def test_an_error_of_an_open_file_gets_its_name(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with (
        small_files(),
        pytest.raises(OSError, match=r"File too large: '.*/weights'"),
        naming(path),
        path.open("wb") as f,
    ):
        f.write(b"x" * 100 * LIMIT)
    with pytest.raises(FileNotFoundError, match=r"other'$"), naming(tmp_path / "weights"):
        (tmp_path / "other").read_bytes()


def test_a_file_keeps_its_content_where_it_cannot_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_whole(path, b"old")
    with small_files(), pytest.raises(OSError, match=r"report\.html"):
        write_whole(path, b"x" * 2 * LIMIT)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("report.html", b"old")]


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as raised:
        write_whole(tmp_path / "file" / "report.html", b"new")
    assert raised.value.filename == str(tmp_path / "file" / "report.html")  # not the file that is written first


def test_a_log_that_is_full_is_reported_later(tmp_path: Path) -> None:
    """Not by whatever line prints, which may be one that reports another error."""
    log = Log(tmp_path / "rank-0.log", "a")
    log.path = tmp_path / "rank-0.log"
    with small_files():
        for _ in range(LIMIT):
            log.write(b"ten bytes\n")
    with pytest.raises(OSError, match=r"rank-0\.log"):
        log.check()
