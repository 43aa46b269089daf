"""A platform on loopback: gives jobs to a worker, hears its progress, and stops jobs."""

from __future__ import annotations

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

WORKER = "worker-1"


class Platform:
    """Serves `job-take`, `job-stop`, `job-done` and `ping` as the SDK calls them.

    heard: what arrived, in order, as (kind, job id, value). answers: job id -> result.
    """

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, object]] = []
        self.jobs: queue.Queue[dict] = queue.Queue()
        self.stops: queue.Queue[str] = queue.Queue()
        self.changed = threading.Condition()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        base = f"http://127.0.0.1:{self.server.server_port}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_POD_ID": WORKER,
            "RUNPOD_AI_API_KEY": "key-of-the-test",
            # Its checks call the internet and want a tenth of the disk.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def hear(self, kind: str, name: str, value: object) -> None:
        with self.changed:
            self.heard.append((kind, name, value))
            self.changed.notify_all()

    def wait(self, wanted, seconds: float):
        """Returns the first thing heard that is wanted; None if it does not come in time."""
        with self.changed:
            self.changed.wait_for(lambda: any(map(wanted, self.heard)), timeout=seconds)
            return next(filter(wanted, self.heard), None)

    def result(self, name: str, seconds: float):
        found = self.wait(lambda h: h[0] == "result" and h[1] == name, seconds)
        return found and found[2]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _handler(platform: Platform) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            parts = urlsplit(self.path)
            if "/job-take/" in parts.path:
                self._give(platform.jobs, lambda job: job)
            elif "/job-stop/" in parts.path:
                self._give(platform.stops, lambda name: {"jobsToStop": [name]})
            else:
                query = parse_qs(parts.query)
                if query.get("status") == ["unhealthy"]:
                    platform.hear("unhealthy", query["check"][0], query["reason"][0])
                self._reply(200, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = urlsplit(self.path).path.rsplit("/", 1)[-1]
            kind = "progress" if body.get("status") == "IN_PROGRESS" else "result"
            platform.hear(kind, name, body["output"] if kind == "progress" else body)
            self._reply(200, {})

        def _give(self, waiting, shape):
            try:
                self._reply(200, shape(waiting.get(timeout=0.5)))
            except queue.Empty:
                self._reply(204, None)

        def _reply(self, status, value):
            body = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given):
            pass

    return Handler
