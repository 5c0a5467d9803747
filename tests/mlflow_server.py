"""A real MLflow server for tests, and a proxy in front of it that misbehaves as told."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[str], str | float | None]
"""Of a request's path: "500", "lost" (passed on, its answer thrown away), "refused" (not passed on), seconds of delay."""


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`mlflow server` with a sqlite store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = f"sqlite:///{folder / 'mlflow.db'}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "served")]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.2)
        log_text = (self.folder / "server.log").read_text()
        self.kill()
        raise AssertionError(f"no MLflow server: {log_text[-2000:]}")

    def kill(self) -> None:
        """At once, as a machine that fails."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(15)
            self._process = None


class Proxy:
    """Listens on a port of its own and passes on to a server, unless `fault` says otherwise for a request."""

    def __init__(self, server: Server) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.fault: Fault = lambda path: None
        self.requests: list[str] = []
        self._server, self._listening = server, None

    def start(self) -> None:
        """Begins to listen; before, connections are refused."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append(self.path)
                fault = proxy.fault(self.path)
                if fault == "refused":
                    self.close_connection = True
                    return
                if isinstance(fault, float):
                    time.sleep(fault)
                status, kind, content = (500, "text/plain", b"no") if fault == "500" else proxy._pass_on(self, body)
                if fault == "lost":
                    self.close_connection = True
                    return
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client has left
                    self.close_connection = True

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._listening = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._listening.daemon_threads = True
        threading.Thread(target=self._listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def _pass_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str, bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in ("host", "connection")}
        upstream.request(handler.command, handler.path, body, headers | {"Accept-Encoding": "identity"})
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        return answer.status, answer.getheader("Content-Type") or "text/plain", content

    def stop(self) -> None:
        """Connections are refused again. Those that stand are cut at their next request."""
        if self._listening is not None:
            self.fault = lambda path: "refused"
            self._listening.shutdown()
            self._listening.server_close()
            self._listening = None
