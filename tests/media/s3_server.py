"""A real S3 server process on loopback, and a proxy before it that breaks what it is told to."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from xicon_infer.media.deliver_bucket import BucketConfig

KEY_ID = "test-key-id"
SECRET = "test-secret-marked"  # looked for in logs
MIN_PART = 64 * 1024
_START_S = 30
_HOP = ("connection", "expect", "transfer-encoding", "keep-alive")


@functools.cache
def moto_port() -> int:
    """Returns the port of the S3 server; it is started once per test process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MOTO_", "PYTHON"))}
    env["S3_UPLOAD_PART_MIN_SIZE"] = str(MIN_PART)  # of AWS: 5 MiB, too much for many tests
    process = subprocess.Popen(command, env=env, **quiet)
    atexit.register(stop, process)
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return port
        time.sleep(0.05)
    raise RuntimeError("the S3 server does not start")


def hide_surroundings(monkeypatch) -> None:
    """Hides the AWS settings and proxies of whoever runs the tests."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(10)


@dataclass(frozen=True)
class Request:
    """What the proxy saw: method, path with query, headers in lower case."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def is_part(self) -> bool:
        return self.method == "PUT" and "uploadId=" in self.path


@dataclass
class Fault:
    """What to do to the requests that fit: times of them, None for every one.

    kind: "503", "403", "301" (an answer of that status), "reset" (hangs up in the middle of the
    body), "lost" (the server does it, its answer never arrives), "slow" (the answer comes after
    `delay_s`), "page" (200 with a web page).
    """

    kind: str
    fits: Callable[[Request], bool] = lambda request: True
    times: int | None = 1
    delay_s: float = 0.0


@dataclass
class Proxy:
    """The proxy of one test: its address, what it saw, what it is to break."""

    port: int
    faults: list[Fault]
    seen: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            self.seen.append(request)
            for fault in self.faults:
                if fault.times != 0 and fault.fits(request):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def count(self, fits: Callable[[Request], bool]) -> int:
        with self.lock:
            return sum(map(fits, self.seen))


@contextlib.contextmanager
def proxy(*faults: Fault) -> Iterator[Proxy]:
    """Yields a running proxy before the S3 server."""
    upstream = moto_port()
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    state = Proxy(server.server_address[1], list(faults))

    class Handler(_Handler):
        proxy = state
        upstream_port = upstream

    server.RequestHandlerClass = Handler
    server.daemon_threads = False  # so that the end waits for what is still under way
    server.handle_error = lambda request, client_address: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    upstream_port: int
    protocol_version = "HTTP/1.1"
    timeout = 20  # of a connection that nobody closed

    def log_message(self, *args):
        pass

    def handle_any(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers)
        fault = self.proxy.fault(request)
        length = int(headers.get("content-length", 0))
        if fault and fault.kind == "reset":
            self.rfile.read(length // 2)
            return self.hang_up()
        body = self.rfile.read(length)
        if len(body) < length:  # the sender gave up; the server must not wait for the rest
            return self.hang_up()
        if fault and fault.kind.isdigit():
            return self.answer(int(fault.kind), _error_body(int(fault.kind)))
        if fault and fault.kind == "page":
            return self.answer(200, b"<html><body>Sign in</body></html>")
        status, answer_headers, answer_body = self.forward(request, body)
        if fault and fault.kind == "lost":
            return self.hang_up()
        if fault and fault.kind == "slow":
            time.sleep(fault.delay_s)
        return self.answer(status, answer_body, answer_headers)

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self.handle_any
        raise AttributeError(name)

    def forward(self, request, body):
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        with contextlib.closing(upstream):
            upstream.request(request.method, request.path, body or None, headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def answer(self, status, body, headers=()):
        with contextlib.suppress(OSError):
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in (*_HOP, "content-length"):
                    self.send_header(name, value)
            if status == 301:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def hang_up(self):
        # Lingering for no time makes the close a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _error_body(status: int) -> bytes:
    code = {403: "ExpiredToken", 503: "SlowDown", 301: "PermanentRedirect"}.get(status, "Error")
    return (
        f"<?xml version='1.0'?><Error><Code>{code}</Code>"
        f"<Message>marked message {SECRET}</Message></Error>"
    ).encode()


@functools.cache
def client():
    """Returns a client that goes past the proxy, to look at what is really there."""
    session = boto3.session.Session(KEY_ID, SECRET, region_name="us-east-1")
    address = f"http://127.0.0.1:{moto_port()}"
    found = session.client("s3", endpoint_url=address, config=Config(proxies={}))
    # It lives as long as the process; an idle connection of it would be reported as forgotten.
    found.meta.events.register("before-send.s3", _without_keeping)
    return found


def _without_keeping(request, **kwargs) -> None:
    request.headers["Connection"] = "close"


def new_bucket() -> str:
    """Returns the name of a new, empty bucket."""
    name = f"films-{secrets.token_hex(6)}"
    client().create_bucket(Bucket=name)
    return name


def config_for(proxy: Proxy, bucket: str, **changes: object) -> BucketConfig:
    """Returns a configuration with short waits and, unless changed, one attempt per request."""
    values = {"attempts": 1, "connect_timeout_s": 2, "read_timeout_s": 30, **changes}
    return BucketConfig(
        endpoint_url=proxy.url,
        bucket=bucket,
        access_key_id=KEY_ID,
        secret_access_key=SECRET,
        **values,
    )


def contents(bucket: str) -> dict[str, bytes]:
    """Returns every object of a bucket; fails if an unfinished upload is left in it."""
    look = client()
    assert not look.list_multipart_uploads(Bucket=bucket).get("Uploads")
    keys = [found["Key"] for found in look.list_objects_v2(Bucket=bucket).get("Contents", [])]
    return {key: look.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def random_file(path: Path, size: int) -> Path:
    """Writes bytes that no compression or repetition can hide a mistake in."""
    path.write_bytes(secrets.token_bytes(size))
    return path


def fetch(url: str) -> tuple[int, bytes]:
    """Returns status and body of a plain GET, as a client of the worker makes it."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request("GET", f"{parts.path}?{parts.query}")
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body
