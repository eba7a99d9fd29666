"""`miles-spmd serve`, with real processes, SGLang and clients."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_spmd.config import Config
from miles_spmd.config.run import RunConfig
from miles_spmd.controller.inputs import errors
from miles_spmd.controller.run_folder import of_task
from miles_spmd.environments.sessions.listener import listen
from miles_spmd.telemetry.responses import RESPONSES_FILE, ResponseRow
from miles_spmd.types.seeds import sample_seed
from tests import forked
from tests.worker.tiny_run import write_config

USER = {"role": "user", "content": "What is 3 plus 3?"}
LONG = 100  # tokens of a response that takes a moment
SETTINGS: dict[str, dict[str, Any]] = {
    "rollout": {"rollout_batch_size": 4, "n_samples_per_prompt": 2, "rollout_max_response_len": LONG},
    "determinism": {"deterministic": True},
}


class Server:
    """A server, and a client of it."""

    def __init__(self, folder: Path, config: Path, *overrides: str, ranks: int = 2) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / "tiny-serve"
        command = ["-m", "miles_spmd", "serve", config, f"--nproc-per-node={ranks}", *overrides]
        environment = os.environ | {"PYTHONPATH": str(forked.REPOSITORY)}
        self.program = forked.start(command, folder, environment, folder / "stdout", folder / "stderr")
        end = time.monotonic() + 120
        while not (self.run_dir / "api_key").exists() or not (self.run_dir / "api_key").read_text():
            assert self.program.poll() is None, (folder / "stderr").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        self.base_url = (self.run_dir / "base_url").read_text().strip()
        self.key = (self.run_dir / "api_key").read_text().strip()
        self.root = self.base_url.removesuffix("/v1")
        self.openai = openai.OpenAI(base_url=self.base_url, api_key=self.key, max_retries=0)
        self.http = httpx.Client(base_url=self.root, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)

    def complete(self, prompt: str, **settings: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": LONG, "logprobs": 1, "return_token_ids": True} | settings
        return self.http.post("/v1/completions", json=body)

    def choice(self, prompt: str, **settings: Any) -> dict[str, Any]:
        response = self.complete(prompt, **settings)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def load(self, path: Path, **settings: Any) -> httpx.Response:
        return self.http.post("/weights", json={"path": str(path), **settings})

    def processes(self) -> list[psutil.Process]:
        launcher = psutil.Process(self.program.pid)
        return [launcher, *launcher.children(recursive=True)]

    def clean_up(self) -> None:
        if self.program.poll() is None:
            for process in self.processes():
                process.kill()


def of_generate(folder: Path, checkpoint: Path) -> list[ResponseRow]:
    """What `miles-spmd generate` writes in its first rollout with the weights of ``checkpoint``."""
    folder.mkdir()
    config = write_config(folder, checkpoint, run={"num_rollout": 1}, **SETTINGS)
    done = forked.run("-m", "miles_spmd", "generate", config, "--nproc-per-node=1", folder=folder)
    assert done.returncode == 0, done.stderr
    lines = (folder / "runs" / "tiny-generate" / RESPONSES_FILE).read_bytes().splitlines()
    return [msgspec.json.decode(line, type=ResponseRow) for line in lines]


def check_rows(server: Server, rows: list[ResponseRow], version: int) -> None:
    """All at once, and among others: what else runs makes no difference."""

    def again(row: ResponseRow) -> dict[str, Any]:
        return server.choice(row.prompt, seed=sample_seed(RunConfig().seed, 0, row.uid, row.index))

    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(server.choice, "Something else", seed=number) for number in range(8)]
        found = list(pool.map(again, rows))
        for one in others:
            one.result()
    assert [choice["token_ids"] for choice in found] == [row.tokens for row in rows]
    assert [choice["logprobs"]["token_logprobs"] for choice in found] == [row.log_probs for row in rows]
    assert {tuple(map(tuple, choice["weight_versions"])) for choice in found} == {
        ((version, len(row.tokens)),) for row in rows
    }


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The checkpoint, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    change(folder, lambda name, tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator()))
    return folder


def change(folder: Path, new: Any) -> None:
    file = folder / "model.safetensors"
    save_file({name: new(name, tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    config = write_config(folder, checkpoint, **SETTINGS)
    (folder / "data.jsonl").unlink()  # which it does not read
    server = Server(folder, config)
    yield server
    server.clean_up()


@pytest.fixture
def weights(server: Server, checkpoint: Path) -> Iterator[None]:
    """A test that loads others leaves those that the server began with."""
    yield
    assert server.load(checkpoint).status_code == 200


def test_it_says_where_it_is(server: Server) -> None:
    said = (server.folder / "stdout").read_text()
    assert f"tiny-serve: serving at {server.base_url}; the API key is in {server.run_dir}/api_key" in said
    assert server.key not in said + (server.folder / "stderr").read_text()
    assert stat.S_IMODE((server.run_dir / "api_key").stat().st_mode) == 0o600
    assert server.root.startswith("http://127.0.0.1:")
    for process in server.processes():
        assert server.key not in " ".join(process.cmdline())
        assert server.key not in str(process.environ())


def test_clients_of_openai(server: Server) -> None:
    client = server.openai
    assert [model.id for model in client.models.list()] == ["policy"]
    ask = {"model": "policy", "messages": [USER], "max_tokens": 6}
    said = client.chat.completions.create(**ask, n=2, seed=5, logprobs=True)
    assert [len(choice.logprobs.content) for choice in said.choices] == [6, 6]
    assert said.choices[0].message.content != said.choices[1].message.content
    assert said.system_fingerprint.startswith("weights-")
    again = client.chat.completions.create(**ask, seed=5, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in again)
    assert text == said.choices[0].message.content
    unseeded = {client.chat.completions.create(**ask).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1
    greedy = {client.completions.create(model="x", prompt="a", max_tokens=6, temperature=0).choices[0].text} | {
        client.completions.create(model="x", prompt="a", max_tokens=6, temperature=1, seed=s, extra_body={"top_k": 1})
        .choices[0]
        .text
        for s in range(3)
    }
    assert len(greedy) == 1
    assert client.responses.create(model="policy", input="Hello", max_output_tokens=4).usage.output_tokens == 4
    stop = said.choices[0].message.content[-1]
    stopped = client.chat.completions.create(**ask, seed=5, stop=[stop])
    assert stop not in stopped.choices[0].message.content
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError):  # the tokenizer of this checkpoint has a template without calls
        client.chat.completions.create(**ask, tools=[tool])


def test_curl(server: Server) -> None:
    def curl(path: str, *options: str) -> Any:
        done = subprocess.run(["curl", "-s", *options, server.root + path], capture_output=True, check=True, timeout=60)
        return json.loads(done.stdout)

    key = f"Authorization: Bearer {server.key}"
    assert curl("/health") == {"status": "ok"}
    body = json.dumps({"messages": [USER], "max_tokens": 3})
    said = curl("/v1/chat/completions", "-H", key, "-d", body)
    assert said["usage"]["completion_tokens"] == 3
    assert curl("/v1/chat/completions", "-d", body)["error"]["code"] == "invalid_api_key"


def test_tokens_are_those_of_generate(server: Server, tmp_path: Path, checkpoint: Path) -> None:
    rows = of_generate(tmp_path / "generated", checkpoint)
    check_rows(server, rows, server.http.get("/weights").json()["version"])


def test_tokens_in_tokens_out(server: Server) -> None:
    of_text = server.choice("What is 3?", seed=3, max_tokens=9)
    prompt = server.complete("What is 3?", max_tokens=1).json()["prompt_token_ids"]
    body = {"seed": 3, "logprobs": 1, "return_token_ids": True}
    of_tokens = server.http.post("/v1/completions", json=body | {"prompt": prompt, "max_tokens": 9}).json()["choices"][
        0
    ]
    assert of_tokens == of_text
    opened = server.http.post("/sessions").json()
    own = {"Authorization": f"Bearer {opened['api_key']}"}
    for _ in range(3):
        sent = body | {"prompt": prompt, "max_tokens": 4}
        said = httpx.post(f"{opened['base_url']}/completions", json=sent, headers=own).json()
        assert said["prompt_token_ids"] == prompt
        prompt = [*prompt, *said["choices"][0]["token_ids"], 65]
    (line,) = server.http.get(f"/sessions/{opened['id']}").json()["trajectories"]
    assert [*line["prompt_tokens"], *line["tokens"]] == prompt[:-1]
    assert line["loss_mask"] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    for bad in ([10**6], [-1], [2**63], ["a", 1], [True], [[1]], []):
        assert server.http.post("/v1/completions", json={"prompt": bad}).status_code == 400


def test_sessions(server: Server) -> None:
    def play(seed: int) -> tuple[str, list[dict[str, Any]]]:
        opened = server.http.post("/sessions", json={"seed": seed}).json()
        client = openai.OpenAI(base_url=opened["base_url"], api_key=opened["api_key"], max_retries=0)
        messages: list[Any] = [USER]
        said = client.chat.completions.create(model="x", messages=messages, max_tokens=5)
        messages += [said.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "And now?"}]
        for branch in range(2):
            last = client.chat.completions.create(
                model="x", messages=messages, max_tokens=5, seed=branch, extra_body={"return_token_ids": True}
            )
        shown = server.http.get(f"/sessions/{opened['id']}").json()
        assert shown["counts"] == {"session_branches/fork": 1.0}
        first, second = shown["trajectories"]
        assert [sum(first["loss_mask"]), sum(second["loss_mask"])] == [10, 5]  # the first turn is trained once
        for line in (first, second):
            assert len(line["tokens"]) == len(line["log_probs"]) == len(line["loss_mask"])
            assert [place for place, one in enumerate(line["log_probs"]) if one] == [
                *range(5),
                *range(len(line["tokens"]) - 5, len(line["tokens"])),
            ]
            assert sum(count for _, count in line["weight_versions"]) == 10
            assert line["prompt_tokens"] == first["prompt_tokens"]
            assert [message["role"] for message in line["messages"]] == ["user", "assistant", "user", "assistant"]
        assert last.choices[0].token_ids in [line["tokens"][-5:] for line in (first, second)]  # type: ignore[attr-defined]
        return opened["id"], shown["trajectories"]

    name, played = play(7)
    assert play(7)[1] == played
    assert play(8)[1] != played
    assert server.http.delete(f"/sessions/{name}").json() == {"id": name, "deleted": True}
    assert server.http.get(f"/sessions/{name}").status_code == 404


def test_other_weights(server: Server, weights: None, tmp_path: Path, other: Path) -> None:
    rows = of_generate(tmp_path / "generated", other)
    before = server.http.get("/weights").json()["version"]
    assert server.load(other, version=before + 5).json() == {"version": before + 5, "path": str(other)}
    assert server.http.get("/weights").json() == {"version": before + 5, "path": str(other)}
    check_rows(server, rows, before + 5)


def test_weights_that_cannot_be_used(server: Server, tmp_path: Path, checkpoint: Path) -> None:
    before, folder = server.http.get("/weights").json(), tmp_path / "damaged"

    def refused(what: str, **settings: Any) -> None:
        response = server.load(folder, **settings)
        assert response.status_code == 400
        assert what in response.json()["error"]["message"]
        assert server.http.get("/weights").json() == before

    sampled = server.choice("a", seed=1)
    refused("no such folder")
    shutil.copytree(checkpoint, folder)
    refused("take another", version=before["version"])
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    whole = file.read_bytes()
    file.write_bytes(whole[:-64])
    refused(
        f"weights {before['version']} stay in use: checkpoint {folder} cannot be loaded:\n  model.safetensors is trun"
    )
    file.write_bytes(whole)
    change(folder, lambda name, tensor: tensor * (float("nan") if name.endswith("input_layernorm.weight") else 1))
    refused("input_layernorm.weight has numbers that are not finite")
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    refused("its config.json is that of another model: layernorm_epsilon is 0.5 there and 1e-06 here")
    assert server.choice("a", seed=1) == sampled
    assert server.load(Path("relative")).json()["error"]["param"] == "path"


def test_weights_while_requests_run(server: Server, weights: None, checkpoint: Path, other: Path) -> None:
    first = server.http.get("/weights").json()["version"]
    for mode, path in (("wait", other), ("continue", checkpoint), ("abort", other)):
        version = server.http.get("/weights").json()["version"]
        with ThreadPoolExecutor(24) as pool:
            running = [pool.submit(server.complete, str(number), seed=number, n=8) for number in range(24)]
            time.sleep(0.1)  # all of them take much longer
            assert server.load(path, running=mode).status_code == 200
            done = [one.result() for one in running]
        refused = [response for response in done if response.status_code == 503]
        assert bool(refused) == (mode == "abort")  # the first may have been complete before
        complete = [response.json() for response in done if response not in refused]
        spans = [choice["weight_versions"] for response in complete for choice in response["choices"]]
        assert all(sum(count for _, count in span) <= LONG for span in spans)
        seen = {tuple(one for one, _ in span) for span in spans}
        assert seen <= {(version,)} if mode != "continue" else (version, version + 1) in seen
    assert server.http.get("/weights").json()["version"] == first + 3


def test_who_is_refused(server: Server) -> None:
    opened = server.http.post("/sessions", json={}).json()
    paths = [("POST", f"/v1/{api}") for api in ("chat/completions", "completions", "responses")]
    paths += [("GET", "/v1/models"), ("POST", "/sessions"), ("GET", "/weights"), ("POST", "/weights")]
    paths += [(method, f"/sessions/{opened['id']}") for method in ("GET", "DELETE")]
    keys = ("", "Bearer", "Bearer x", f"Basic {server.key}", f"Bearer {server.key}x", f"Bearer {opened['api_key']}")
    for method, path in paths:
        for key in keys:
            response = httpx.request(method, server.root + path, headers={"Authorization": key}, content=b"{}")
            assert (path, key, response.status_code) == (path, key, 401)
    models = "/session/" + opened["id"] + "/v1/models"
    assert server.http.get(models).status_code == 401  # each key for its own
    for method, path in (("GET", "/"), ("GET", "/v1"), ("PUT", "/weights"), ("GET", "/sessions/../../etc/passwd")):
        assert server.http.request(method, path).status_code in (404, 405)
    assert server.http.get("/sessions/x").status_code == 404
    bad = [{"top_k": 2**31}, {"top_k": 1.5}, {"top_p": 0}, {"temperature": -1}, {"temperature": "x"}, {"seed": 2**64}]
    bad += [{"frequency_penalty": 1}, {"n": 10**9}, {"max_tokens": 0}]
    for settings in bad:
        assert (settings, server.complete("a", **settings).status_code) == (settings, 400)
    assert server.complete("a" * 10**5).json()["error"]["code"] == "context_length_exceeded"
    assert server.http.post("/v1/completions", content=b"x" * (2**24 + 1)).status_code == 413
    assert server.choice("a", max_tokens=1)  # it still serves


@pytest.fixture
def start(tmp_path: Path, checkpoint: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*overrides: str, ranks: int) -> Server:
        servers.append(Server(tmp_path, write_config(tmp_path, checkpoint, **SETTINGS), *overrides, ranks=ranks))
        return servers[-1]

    yield start
    for server in servers:
        server.clean_up()


def test_sigterm_ends_it(start: Callable[..., Server]) -> None:
    server = start("rollout_max_response_len=120", ranks=1)
    processes = server.processes()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(server.complete, "a", n=64, max_tokens=120)
        time.sleep(0.2)
        os.kill(server.program.pid, signal.SIGTERM)
        assert running.result().status_code == 503
    assert server.program.wait(60) == 0
    assert not psutil.wait_procs(processes, 5)[1]
    assert not (server.run_dir / "api_key").exists()
    assert (server.folder / "stderr").read_text() == ""
    assert "stopping: SIGTERM" in (server.folder / "stdout").read_text()


def test_a_rank_that_dies_ends_it(start: Callable[..., Server]) -> None:
    server = start(ranks=2)
    processes = server.processes()
    found = re.match(r"--- .* pid (\d+)\n", (server.run_dir / "logs" / "latest" / "rank-1.log").read_text())
    assert found
    rank = psutil.Process(int(found[1]))
    rank.kill()
    assert server.program.wait(60) == 1
    assert not psutil.wait_procs(processes, 5)[1]
    (said,) = [line for line in (server.folder / "stderr").read_text().splitlines() if line.startswith("miles-spmd: ")]
    assert f"pid {rank.pid}) died: rollout, step 0, serving" in said


def test_places_that_cannot_be_had(checkpoint: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        tables: dict[str, Any] = {"model": {"hf_checkpoint": checkpoint}, "data": {"prompt_data": "none:none"}}
        (problem,) = errors(Config(**tables, serve={"serve_port": port}), task="serve")
    assert f"serve.serve_port: cannot listen at 127.0.0.1, port {port}: Address already in use" in problem
    (problem,) = errors(Config(**tables, serve={"serve_host": "192.0.2.1"}), task="serve")
    assert "serve.serve_host: cannot listen at 192.0.2.1" in problem


def test_only_the_policy_is_served() -> None:
    config = Config(
        model={"hf_checkpoint": "none"},
        data={"prompt_data": "none"},
        second_policy={"second_num_gpus": 1, "second_roles": ["a"]},
        reward={"judge_num_gpus": 1, "judge_hf_checkpoint": "judge"},
    )
    served = of_task(config, "serve")
    assert served.run.name == "run-serve"
    assert served.policies == ["policy"]
    assert not served.has_judge
