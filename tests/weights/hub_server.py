"""A synthetic hub, its CDN and a plain web server on 127.0.0.1, with faults on order.

It answers as the real ones do: the hub redirects large files to a signed address on another host
(here another port) and names commit, size and sha256 in headers; both know Range and If-Range.
Every request and every byte of a body is counted.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from urllib.parse import unquote, urlsplit

import huggingface_hub
import torch
from huggingface_hub import constants
from safetensors.torch import save

from xicon_infer.weights.download_http import Transfer
from xicon_infer.weights.manifest import FileEntry

COMMIT = "c0ffee" * 6 + "abcd"
REPO = "Org/Models"
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one answer.

    status: answer this instead. close_after: end the connection after so many bytes of the body.
    body: send this instead of the file. claim: Content-Length, whatever is sent. no_range: ignore
    Range. range_shift: send another piece than asked for. drip_s: one byte, then wait so long.
    redirect: send there, with `status` or 302. headers: added or replaced.
    """

    status: int = 0
    close_after: int | None = None
    body: bytes | None = None
    claim: int | None = None
    no_range: bool = False
    range_shift: int = 0
    drip_s: float = 0.0
    redirect: str = ""
    headers: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Hosted:
    """One file: its bytes, and on the hub whether it is kept as LFS object and is gated."""

    body: bytes
    lfs: bool = True
    gated: bool = False
    etag: str = ""


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    method: str
    path: str
    headers: dict


class Server:
    """Both hosts. `hub` and `web` hold what is published, by (repository, path) and by name."""

    def __init__(self):
        self.hub = {}
        self.web = {}
        self.faults = defaultdict(list)
        self.asked = []
        self.sent = Counter()
        self.lock = threading.Lock()
        self.hosts = [self._start(), self._start()]
        # By two names: older versions of the hub's library compare hosts without their ports, and
        # ask a CDN on the hub's own host for what only the hub knows.
        hub, cdn = self.hosts
        self.url = f"http://127.0.0.1:{hub.server_port}"
        self.cdn = f"http://localhost:{cdn.server_port}"

    def _start(self):
        server = self

        class Handler(_Handler):
            owner = server

        host = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        host.daemon_threads = True
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        return host

    def close(self):
        for host in self.hosts:
            host.shutdown()
            host.server_close()

    def publish(self, name, body, **options):
        """Puts a file on the hub and returns its entry, with nothing listed about it."""
        self.hub[REPO, name] = Hosted(body, **options)
        return entry(name)

    def publish_web(self, name, body, **options):
        """Puts a file on the plain web server and returns its entry."""
        self.web[name] = Hosted(body, **{"etag": f'"{digest(body)[:8]}"', **options})
        return entry(name, url=f"{self.url}/web/{name}")

    def transfer(self, **changes):
        """Returns settings that reach this hub and lose no time."""
        options = {"timeout_s": 5.0, "backoff_s": (0.0,) * 3, "endpoint": self.url}
        return Transfer(**{**options, **changes})

    def count(self, method, part=""):
        return sum(1 for ask in self.asked if ask.method == method and part in ask.path)


def digest(body):
    return hashlib.sha256(body).hexdigest()


def entry(name, **changes):
    """Returns an entry of which nothing is known but where it is published."""
    base = {
        "id": name.rsplit("/", 1)[-1].split(".")[0],
        "component": "vae",
        "used_by": ("scail/fp8",),
        "repo": REPO,
        "path": name,
        "revision": None,
        "size_bytes": None,
        "sha256": None,
        "licence": "MIT",
        "licence_source": "test",
        "names": (name.rsplit("/", 1)[-1],),
    }
    return FileEntry(**{**base, **changes})


def weights(num_bytes=4096, seed=0):
    """Returns a safetensors file with one tensor of so many bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return save({"weight": tensor.view(torch.float8_e4m3fn)})


class _Handler(BaseHTTPRequestHandler):
    owner: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer(send_body=True)

    def do_HEAD(self):
        self._answer(send_body=False)

    def _answer(self, *, send_body):
        path = unquote(urlsplit(self.path).path)
        with self.owner.lock:
            self.owner.asked.append(
                Asked(self.command, path, {k.lower(): v for k, v in self.headers.items()})
            )
            orders = self.owner.faults[self.command, path] or self.owner.faults[path]
            fault = Fault() if not orders else orders.pop(0)
        self.close_connection = True
        with suppress(ConnectionError, BrokenPipeError):
            if fault.redirect:
                headers = {"Location": fault.redirect, "Content-Length": "0"}
                self._headers(fault.status or 302, headers)
            elif fault.status:
                self._headers(fault.status, {"Content-Length": "0", **fault.headers})
            elif path.startswith("/web/"):
                self._web(path, fault, send_body=send_body)
            elif path.startswith("/cdn/"):
                self._cdn(path, fault, send_body=send_body)
            else:
                self._resolve(path, fault, send_body=send_body)

    def _headers(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _web(self, path, fault, *, send_body):
        hosted = self.owner.web.get(path.removeprefix("/web/"))
        if hosted is None:
            self._headers(404, {"Content-Length": "0"})
            return
        headers = {"ETag": hosted.etag} if hosted.etag else {}
        self._body(path, hosted.body, headers, fault, send_body=send_body)

    def _cdn(self, path, fault, *, send_body):
        wanted = path.removeprefix("/cdn/")
        body = next(h.body for h in self.owner.hub.values() if digest(h.body) == wanted)
        headers = {"ETag": '"a-name-of-its-own"'}  # not the hub's, as on the real CDN
        self._body(path, body, headers, fault, send_body=send_body)

    def _resolve(self, path, fault, *, send_body):
        repo, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        hosted = self.owner.hub.get((repo, name))
        refused = self._refusal(repo, revision, hosted)
        if refused:
            status, code = refused
            self._headers(status, {"X-Error-Code": code, "Content-Length": "0"})
            return
        headers = {"X-Repo-Commit": COMMIT}
        if not hosted.lfs:
            blob = b"blob %d\0" % len(hosted.body) + hosted.body
            headers["ETag"] = f'"{hashlib.sha1(blob).hexdigest()}"'
            self._body(path, hosted.body, headers, fault, send_body=send_body)
            return
        sha256 = digest(hosted.body)
        headers["X-Linked-Size"] = len(hosted.body)
        headers["X-Linked-Etag"] = f'"{sha256}"'
        headers["Location"] = f"{self.owner.cdn}/cdn/{sha256}?X-Signature=very-secret"
        headers["Content-Length"] = "0"
        self._headers(302, {**headers, **fault.headers})

    def _refusal(self, repo, revision, hosted):
        if repo not in {known for known, _ in self.owner.hub}:
            return 401, "RepoNotFound"
        if revision not in ("main", COMMIT):
            return 404, "RevisionNotFound"
        if hosted is None:
            return 404, "EntryNotFound"
        if hosted.gated and self.headers.get("Authorization") != "Bearer hf_right":
            return 401, "GatedRepo"
        return None

    def _body(self, path, body, headers, fault, *, send_body):
        status, start = 200, self._range_start(headers)
        body = body if fault.body is None else fault.body
        headers = {"Accept-Ranges": "bytes", **headers}
        if start and not fault.no_range:
            if start >= len(body):
                self._headers(416, {"Content-Range": f"bytes */{len(body)}"})
                return
            status, start = 206, start + fault.range_shift
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        claimed = len(body) if fault.claim is None else fault.claim
        self._headers(status, {**headers, "Content-Length": claimed, **fault.headers})
        if send_body:
            self._send(path, body[: fault.close_after], fault.drip_s)

    def _range_start(self, headers):
        """Returns where the answer is to begin; 0 if If-Range names another version."""
        asked = self.headers.get("Range", "")
        condition = self.headers.get("If-Range")
        if not asked or (condition and condition != headers.get("ETag")):
            return 0
        return int(asked.removeprefix("bytes=").split("-")[0])

    def _send(self, path, body, drip_s):
        step = 1 if drip_s else 1 << 16
        for position in range(0, len(body), step):
            block = body[position : position + step]
            self.wfile.write(block)
            self.wfile.flush()
            with self.owner.lock:
                self.owner.sent[path] += len(block)
            time.sleep(drip_s)


@contextmanager
def serving(monkeypatch, tmp_path, *, token=""):
    """Yields the server, with huggingface_hub online, without the user's token.

    Fails when anything in this process looks up or connects to another machine.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # It would ask the real hub for a list of agents, to name one in its User-Agent.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    outside = _forbid_other_hosts(monkeypatch)
    huggingface_hub.close_session()
    server = Server()
    try:
        yield server
    finally:
        server.close()
        huggingface_hub.close_session()
    assert not outside, f"another machine was asked for: {outside}"


def _forbid_other_hosts(monkeypatch):
    outside = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guard(host):
        with suppress(ValueError):
            if ip_address(host).is_loopback:
                return
        if host != "localhost":
            outside.append(host)
            raise OSError(f"a test tried to reach {host}")

    def guarded_connect(self, address):
        if self.family != socket.AF_UNIX:
            guard(address[0])
        return connect(self, address)

    def guarded_look_up(host, *args, **options):
        guard(host)
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    return outside
