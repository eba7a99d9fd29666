"""Replies that are recorded: by several processes at once, and behind half a line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from miles_spmd.services.recording import Recording, RecordingError


def test_the_first_reply_counts(tmp_path: Path) -> None:
    one, other = (Recording(tmp_path / "r.jsonl", adds=True) for _ in range(2))
    assert one.add({"query": "a", "topk": 1}, [1]) == [1]
    assert {"query": "a", "topk": 1} not in other
    assert other.add({"topk": 1, "query": "a"}, [2]) == [1]  # the other one was first
    assert one.add({"query": "b", "topk": 1}, None) is None
    again = Recording(tmp_path / "r.jsonl", adds=False)
    assert again[{"query": "a", "topk": 1}] == [1]
    assert {"query": "b", "topk": 1} in again
    assert {"query": "b", "topk": 2} not in again


def test_many_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"

    def write(writer: int) -> list[str]:
        recording = Recording(path, adds=True)
        return [recording.add(number, f"{writer}:{number}" * 100) for number in range(50)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(write, range(4)))
    assert len({tuple(replies) for replies in found}) == 1
    assert len(path.read_bytes().splitlines()) == 50


def test_half_a_line_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Recording(path, adds=True).add("a", 1)
    with path.open("ab") as file:
        file.write(b'{"request": "b", "re')
    recording = Recording(path, adds=True)
    assert "b" not in recording
    recording.add("c", 3)
    assert Recording(path, adds=False)["c"] == 3
    assert len(path.read_bytes().splitlines()) == 2


def test_another_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"request": 1, "reply": 2}\n{"id": 1}\n')
    with pytest.raises(RecordingError, match=r"r\.jsonl:2: not a recorded request and reply: .*`request`"):
        Recording(path, adds=False)
    with pytest.raises(FileNotFoundError):
        Recording(tmp_path / "none.jsonl", adds=False)
