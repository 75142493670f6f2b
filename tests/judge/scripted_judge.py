"""A small server that speaks the protocol of chat completions, with scripted replies and a record of the questions."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server answers: a status, a body, headers, and how long it waits before."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0.0


def completion(text: str) -> Reply:
    tree = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return Reply(body=json.dumps(tree).encode())


def verdict(score: float, reason: str = "so") -> Reply:
    return completion(json.dumps({"score": score, "reason": reason}))


@dataclass
class Server:
    """``script`` gives the reply to each question, by its number from 0."""

    script: Callable[[int, dict[str, Any]], Reply]
    url: str = ""
    questions: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serving(script: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Server]:
    """Runs a server on a free port of this machine."""
    state = Server(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number = len(state.questions)
            state.questions.append({"path": self.path, **question})
            state.headers.append(dict(self.headers))
            reply = state.script(number, question)
            time.sleep(reply.wait)
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has not waited

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
