"""A real HTTP server in threads of this process, whose replies a test decides."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    content: Any  # JSON, or bytes as they are
    status: int = 200
    headers: Mapping[str, str] = {}


class Server:
    """``url`` and the requests that arrived: path, headers and JSON of each."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.paths: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.bodies: list[Any] = []
        self.open = self.most_open = 0  # requests at the same time


@contextlib.contextmanager
def serving(reply: Callable[[Any, int], Any]) -> Iterator[Server]:
    """Serve ``reply(body, number)``, a :class:`Reply` or its content; an exception closes the connection."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.bodies)
                server.bodies.append(body)
                server.paths.append(self.path)
                server.headers.append(dict(self.headers))
                server.open += 1
                server.most_open = max(server.most_open, server.open)
            try:
                self._reply(reply(body, number))
            except Exception:
                self.close_connection = True
            finally:
                with lock:
                    server.open -= 1

        def _reply(self, given: Any) -> None:
            found = given if isinstance(given, Reply) else Reply(given)
            content = found.content if isinstance(found.content, bytes) else json.dumps(found.content).encode()
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:  # a client that has gone away
            pass

    with Listener(("127.0.0.1", 0), Handler) as listener:
        server = Server(f"http://127.0.0.1:{listener.server_port}")
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        listener.shutdown()
        thread.join()
