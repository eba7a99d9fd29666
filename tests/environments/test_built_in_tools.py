"""The tools ``python`` and ``search``: in the real sandbox, over a real index, with a real server."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.environments.bm25 import Document, Index
from miles_spmd.environments.calls import Call
from miles_spmd.environments.execution import Result, Toolbox, ToolUnavailableError
from miles_spmd.environments.process import load_environment
from miles_spmd.environments.python_tool import python_tool
from miles_spmd.environments.search_tool import search_tool
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.sandbox.sandbox import problem
from tests.services.server import Reply, serving

needs_sandbox = pytest.mark.skipif(problem() is not None, reason=f"no sandbox: {problem()}")
DOCUMENTS = [
    {"id": "b", "text": "Oslo is the capital of Norway.", "title": "Oslo"},
    {"id": "a", "text": "Bergen is a city of Norway."},
    {"id": 3, "contents": "東京は日本の首都です。", "title": "Tōkyō"},
]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in DOCUMENTS))
    return str(path)


def call(tool: Any, *arguments: dict[str, Any]) -> list[Result]:
    box = Toolbox([tool], timeout=20.0)
    try:
        calls = [Call(f"call{i}", tool.__name__, each) for i, each in enumerate(arguments)]
        return asyncio.run(box.run(calls))
    finally:
        box.close()


@needs_sandbox
def test_python() -> None:
    tool = python_tool(seconds=1.0, memory_mib=200, programs=2)
    codes = [
        "print(6 * 7)",
        "x = 1",
        "print('so far')\n1 / 0",
        "print('begun', flush=True)\nwhile True: pass",
        "x = 'a' * 10**9",
        "print('x' * 2**22)",
        "print(open('/etc/passwd').read())",
    ]
    texts = [result.text for result in call(tool, *({"code": code} for code in codes))]
    assert texts[:2] == ["42\n", "[The program printed nothing.]"]
    assert re.fullmatch(
        r"so far\nTraceback .*\nZeroDivisionError: .*\n\[The program ended with status 1\.\]", texts[2], re.S
    )
    assert texts[3] == "begun\n[The program was stopped after 1 s.]"
    assert texts[4].endswith("MemoryError\n[The program ran out of memory: 200 MiB.]")
    assert texts[5].endswith("xx\n[... cut]\n[The program was stopped because it wrote more than 1,048,576 bytes.]")
    assert len(texts[5]) <= 16_384
    assert "FileNotFoundError" in texts[6]


def test_a_machine_without_a_sandbox_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_spmd.sandbox.sandbox.problem", lambda: "bwrap is not installed")
    with pytest.raises(
        PlugPointError, match="environment_kwargs: the tool 'python' requires the sandbox: bwrap is not"
    ):
        load_environment("tools", {"functions": ["python"]})


def bm25(documents: list[dict[str, Any]], query: str) -> list[str]:
    """Ids by the formula of Lucene's BM25Similarity, word for word."""
    texts = {str(each["id"]): each["text"].lower().split() for each in documents}
    mean = sum(map(len, texts.values())) / len(texts)

    def score(words: list[str]) -> float:
        total = 0.0
        for word in query.split():
            containing, times = sum(word in other for other in texts.values()), words.count(word)
            idf = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
            total += idf * times / (times + 1.2 * (1 - 0.75 + 0.75 * len(words) / mean))
        return round(total, 5)

    found = {identity: score(words) for identity, words in texts.items()}
    return sorted((i for i in found if found[i] > 0), key=lambda i: (-found[i], i))


def test_the_order_of_bm25() -> None:
    source = random.Random(1)
    vocabulary = [f"w{i}" for i in range(30)]
    documents = [
        {"id": i, "text": " ".join(source.choices(vocabulary, k=source.randint(1, 12)))} for i in range(60)
    ]  # fmt: skip
    documents += [{"id": 100 + i, "text": "w1 w2 w3"} for i in range(5)]  # ties
    index = Index([Document(**each) for each in documents])
    for query in ("w1", "w1 w2 w3", "w4 w4 w9", "w29 w0 unknown", "unknown"):
        expected = bm25(documents, query)
        assert [str(found.id) for found in index.search(query, 100)] == expected
        assert [str(found.id) for found in index.search(query, 4)] == expected[:4]
    assert Counter(len(index.search("w1 w2 w3", count)) for count in (1, 2, 3)) == {1: 1, 2: 1, 3: 1}


def test_search_in_a_corpus(corpus: str) -> None:
    texts = [result.text for result in call(search_tool(corpus=corpus, topk=2), *map(as_query, ("NORWAY!", "京", "?")))]
    assert texts == [
        "[1] Bergen is a city of Norway.\n\n[2] Oslo\nOslo is the capital of Norway.",
        "[1] Tōkyō\n東京は日本の首都です。",
        "No document was found.",
    ]


def as_query(query: str) -> dict[str, Any]:
    return {"query": query}


RETRIEVED = [
    {"result": [[{"document": {"id": "7", "contents": '"Oslo"\nA capital.'}, "score": 0.5}]]},  # Search-R1 with scores
    {"result": [[{"id": "7", "contents": '"Oslo"\nA capital.'}]]},  # without
    {"documents": ['"Oslo"\nA capital.', "more than topk"]},
    {"result": [[{"document": {"title": '"Oslo"', "text": "A capital.", "contents": "both"}}]]},  # its BM25
    {"result": [[{"document": '"Oslo"\nA capital.', "score": 0.5}]]},  # its reranker, with scores
    {"result": [['"Oslo"\nA capital.']]},  # without
    [{"title": '"Oslo"', "text": "A capital."}],
]


@pytest.mark.parametrize("reply", RETRIEVED)
def test_replies_of_a_service(reply: Any) -> None:
    with serving(lambda *_: reply) as server:
        (result,) = call(search_tool(url=server.url + "/retrieve", topk=1), as_query("Oslo?"))
    assert result.text == '[1] "Oslo"\nA capital.'
    assert server.bodies == [{"queries": ["Oslo?"], "topk": 1, "return_scores": True}]


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (Reply("down", 503), 'the search service http.*status 503: "down"'),
        (Reply(b"<html>"), "the search service http.*the reply is not JSON: <html>"),
        (Reply({"error": "no index"}), "the reply {'error': 'no index'} has no documents"),
        (Reply({"result": [[{"document": {"contents": 3}}]]}), "has no documents"),
        (Reply({"result": [[{"document": None}]]}), "has no documents"),
        (Reply({"result": [None]}), "has no documents"),
        (Reply({"result": "Oslo"}), "has no documents"),
        (Reply({"result": {"Oslo": "A capital."}}), "has no documents"),
        (Reply([[["Oslo"]]]), "has no documents"),
    ],
)
def test_a_service_that_fails_is_not_the_policys_error(reply: Reply, cause: str, tmp_path: Path) -> None:
    recording = tmp_path / "searches.jsonl"
    with serving(lambda *_: reply) as server, pytest.raises(ToolUnavailableError, match=cause):
        call(search_tool(url=server.url, tool_timeout=0.5, recording=str(recording)), as_query("Oslo?"))
    assert recording.read_bytes() == b""


@pytest.fixture
def slow() -> Iterator[Any]:
    with serving(lambda body, number: time.sleep(0.1 if number == 0 else 0) or [f"{body['query']} {number}"]) as server:
        yield server


def test_a_recorded_run_is_replayed_without_the_service(slow: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "searches.jsonl")
    recorded = search_tool(url=slow.url, request_form="query", recording=path)
    first = call(recorded, *map(as_query, "aba"))
    assert first[0] == first[2]  # the request was sent twice, and its first reply counts
    assert call(search_tool(url=slow.url, request_form="query", recording=path), as_query("b")) == [first[1]]
    assert len(slow.bodies) <= 3
    assert slow.bodies[0] == {"query": slow.bodies[0]["query"], "topk": 3}
    replayed = search_tool(url="http://nowhere.invalid", recording=path, replay=True)
    assert call(replayed, *map(as_query, "aba")) == first
    with pytest.raises(
        ToolUnavailableError, match=r"searches\.jsonl has no reply to {'query': 'c', 'topk': 3}, and replay"
    ):
        call(replayed, as_query("c"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "name either a corpus or the url"),
        ({"corpus": "none.jsonl"}, "the corpus none.jsonl cannot be read: No such file"),
        ({"corpus": "CORPUS", "topk": "3"}, "search = {.*'topk': '3'}: '<' not supported"),
        ({"corpus": "CORPUS", "topk": 0}, "topk = 0"),
        ({"corpus": "CORPUS", "top_k": 3}, "search: unknown options top_k; known: corpus, recording, replay"),
        ({"corpus": "CORPUS", "recording": "r.jsonl"}, "a corpus needs no recording"),
        ({"url": "http://x", "replay": True}, "replay = true requires the recording"),
        (
            {"url": "http://x", "replay": True, "recording": "none/r.jsonl"},
            "the recording none/r.jsonl cannot be opened",
        ),
        ({"url": "http://x", "request_form": "soap"}, "request_form = 'soap'; known: queries, query"),
    ],
)
def test_options_are_checked_where_the_environment_is_loaded(
    corpus: str, options: dict[str, Any], problem: str
) -> None:
    given = {name: corpus if value == "CORPUS" else value for name, value in options.items()}
    with pytest.raises(PlugPointError, match=f"environment.environment = 'tools', environment_kwargs: .*{problem}"):
        load_environment("tools", {"functions": ["search"], "search": given})
    assert load_environment("tools", {"functions": ["search"], "search": {"corpus": corpus}})


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('{"id": 1, "text": "a"}\n{"id": 2}', r"corpus\.jsonl:2: .*`text`, or `contents`"),
        ('{"id": 1, "text": "a"}\nfree text', r'corpus\.jsonl:2: .*; a line is {"id": \.\.\., "text": '),
        ('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', "2 documents have the id '1'"),
        ("", "is empty"),
    ],
)
def test_a_corpus_that_cannot_be_read(tmp_path: Path, lines: str, problem: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=problem):
        search_tool(corpus=str(path))


def test_names_of_tools() -> None:
    with pytest.raises(PlugPointError, match="'browse' is unknown; known: python, search, or your own"):
        load_environment("tools", {"functions": ["browse"]})
    with pytest.raises(PlugPointError, match=r"search = {'topk': 1} has no effect, because functions do not contain"):
        load_environment("tools", {"functions": ["tests.environments.user_tools:add"], "search": {"topk": 1}})
