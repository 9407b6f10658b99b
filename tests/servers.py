"""A loopback server that speaks the chat completions protocol, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = str | tuple[str, Any] | Callable[[dict], str]


class Server(ThreadingHTTPServer):
    """Answers each request by the next of ``plan``, then by ``usual``; ``seen`` holds what came in
    (headers, body).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[Behaviour] = []
        self.usual: Behaviour = '{"score": 0.5, "reason": "usual"}'
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.models: (
            list[str] | int
        ) = []  # what GET /models lists, or the status that it answers with
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        """List the models."""
        if isinstance(self.server.models, int):
            self.reply(self.server.models, "{}")
            return
        listed = [
            {"id": name, "object": "model", "created": 0, "owned_by": "x"}
            for name in self.server.models
        ]
        self.reply(200, json.dumps({"object": "list", "data": listed}))

    def do_POST(self) -> None:
        """Behave as planned."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(
            ({name.lower(): value for name, value in self.headers.items()}, body)
        )
        plan = self.server.plan.pop(0) if self.server.plan else self.server.usual
        plan = plan(body) if callable(plan) else plan
        kind, value = plan if isinstance(plan, tuple) else ("answer", plan)
        if kind == "slow":
            time.sleep(value)
            self.reply(200, completion("too late"))
        elif kind == "status":
            status, headers = value
            echo = {
                "error": {"message": f"wrong: {self.headers['Authorization']} {json.dumps(body)}"}
            }
            self.reply(status, json.dumps(echo), headers)
        elif kind == "refuse":
            self.reply(*value)
        elif kind == "half":
            self.reply(200, completion("half")[:40])
        elif kind == "torn":
            self.reply(200, completion("torn")[:40], {"Content-Length": "4000"})
        elif kind == "drip":
            self.drip(completion("too late"), value)
        elif kind == "endless":
            self.reply(200, " " * value, {"Content-Length": str(2 * value)})
        elif kind == "gzip":
            self.reply(200, "{}", {"Content-Encoding": "gzip"})
        elif kind == "raw":
            self.reply(200, value)
        else:
            self.reply(200, completion(value, "length" if kind == "length" else "stop"))

    def reply(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        """Send ``text`` with ``headers`` on top of the usual ones."""
        self.send_response(status)
        usual = {"Content-Type": "application/json", "Content-Length": str(len(text.encode()))}
        for name, value in (usual | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(text.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass

    def drip(self, text: str, pause: float) -> None:
        """Send a whole answer, a byte at a time."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        for letter in text:
            try:
                self.wfile.write(letter.encode())
                self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):
                return
            time.sleep(pause)


def completion(text: str, finish: str = "stop") -> str:
    """A chat completion of 100 prompt tokens and 10 completion tokens."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    )


@contextmanager
def running() -> Iterator[Server]:
    """A server on a free port of the loopback address."""
    server = Server()
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
