"""Engines behind an endpoint of HTTP, until the run is asked to stop: no rank trains, and no data is read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from miles_spmd.config import Config
from miles_spmd.config.serve import JOB
from miles_spmd.controller.attempts import AttemptWriter
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.rollout_session import RolloutSession
from miles_spmd.controller.generation.sampling import Sampling
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.environments.context import ModelSource
from miles_spmd.environments.serving.messages import Asked, Left, Load, Loaded, Outputs
from miles_spmd.environments.serving.process import Served
from miles_spmd.environments.serving.server import Server
from miles_spmd.models import load_family
from miles_spmd.protocol.commands import LoadWeights
from miles_spmd.types.printable import MAX_LINE, printable
from miles_spmd.types.request import Request
from miles_spmd.types.run_files import API_KEY_FILE, BASE_URL_FILE


def serve(config: Config, cluster: Cluster, attempt: AttemptWriter, stopping: Stopping) -> None:
    """Serve until a stop is requested."""

    def tell(text: str) -> None:
        print(f"{config.run.name}: {text}", flush=True)
        attempt.tell(f"{config.run.name}: {text}")

    key = f"sk-{secrets.token_urlsafe(32)}"
    with closing(Server(attempt.folder / "server.log", cluster.wake)) as server:
        cluster.wait_ready()
        with cluster.rollout(0, purpose="serving", endless=True) as engines:
            url = server.listen(_served(config, cluster, key))
            with _files(config.run_dir, url, key) as key_file:
                stopping.begin(0)
                stopping.show = lambda text: tell(f"stopping: {stopping.source}")
                attempt.ready(0, [info.host for info in cluster.infos])
                attempt.phase("serving")
                tell(f"serving at {url}/v1; the API key is in {key_file}")
                serving = Serving(cluster, engines, server, tell)
                while not stopping.source:
                    serving.advance(lambda: bool(stopping.source))


class Serving:
    """What goes on between ``server`` and ``engines``. Methods raise ServerError and a WorkerError."""

    def __init__(self, cluster: Cluster, engines: RolloutSession, server: Server, tell: Callable[[str], None]) -> None:
        """``tell`` prints a line for people."""
        self._cluster, self._engines, self._server, self._tell = cluster, engines, server, tell
        self._ready: list[Request] = []  # to be sent once no weights are to be loaded
        self._load: Load | None = None

    def advance(self, interrupt: Callable[[], bool]) -> None:
        """Wait until there is something to do, or ``interrupt`` returns True, and do it."""
        output = self._engines.next(lambda: self._server.has_news or interrupt())
        if outputs := [*([] if output is None else [output]), *self._engines.take()]:
            self._server.send(Outputs(outputs))
        for message in self._server.take():
            match message:
                case Asked(requests):
                    self._ready += requests
                case Left(rid):
                    self._ready = [request for request in self._ready if request.rid != rid]
                    self._engines.abort([rid])
                case Load():
                    self._load = message
                    if message.running == "abort":
                        self._engines.abort()
        if self._load is not None and (self._load.running == "continue" or self._engines.is_idle):
            self._server.send(Loaded(self._load_weights(self._load)))
            self._load = None
        if self._ready and self._load is None:
            self._engines.submit(self._ready)
            self._ready = []

    def _load_weights(self, load: Load) -> str:
        """Return "" or why the engines have kept their weights."""
        results = self._cluster.call(LoadWeights(load.path, load.version), step=0)
        problem = next((problem for result in results if (problem := result.detail.get("problem", ""))), "")
        text = f"weights refused: {problem}" if problem else f"weights {load.version}: {load.path}"
        self._tell(printable(text, MAX_LINE))  # a client has chosen the path
        return problem


def _served(config: Config, cluster: Cluster, key: str) -> Served:
    folder = Path(config.model.hf_checkpoint)
    family = load_family(folder)
    engines = [info.engine.longest_request for info in cluster.infos if info.engine is not None]
    longest = [family.max_sequence_length, config.sglang.get("context_length"), *engines]
    source = ModelSource(folder, family.vocab_size, min(filter(None, longest)), config.data.chat_template_date)
    host = cluster.address if config.serve.serve_host == JOB else config.serve.serve_host
    params = Sampling.of_step(config, 0).params
    return Served(
        host, config.serve.serve_port, key, source, config.data.chat_template_kwargs, params, 0, str(folder.absolute())
    )


@contextmanager
def _files(run_dir: Path, url: str, key: str) -> Iterator[Path]:
    """Leave address and key in the run's folder, the key for this user alone; yield the file of the key."""
    paths = {run_dir / BASE_URL_FILE: (f"{url}/v1", 0o644), run_dir / API_KEY_FILE: (key, 0o600)}
    try:
        for path, (text, mode) in paths.items():
            path.unlink(missing_ok=True)  # of a server that was killed: its mode may be another one
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
                file.write(f"{text}\n")
        yield run_dir / API_KEY_FILE
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
