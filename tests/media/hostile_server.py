"""A web server on 127.0.0.1 that lies, drips, never ends, and a network that leads only to it.

Names resolve to addresses that look public; the connector of this network sends every one of
them to the server here, and refuses to open anything else. So no test reaches another machine.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from xicon_infer.media.fetch_network import Network

PUBLIC = "93.184.215.14"
OTHER = "93.184.215.15"
PRIVATE = "10.1.2.3"
GONE = "93.184.215.99"
"""Looks public, and nobody answers there."""


def answer(body=b"", status=200, *, length=True, **headers):
    """Returns one whole answer; `length` may be another number, or False for none."""
    lines = [f"HTTP/1.1 {status} Some Reason"]
    if length is not False:
        lines.append(f"Content-Length: {len(body) if length is True else length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def redirect(location, status=302):
    return answer(status=status, Location=location)


class HostileServer:
    """Serves `pages`: path -> function(number of the request) -> parts, bytes or seconds to wait.

    requests: the head of each request, by path. sent: bytes that were taken by the client.
    """

    def __init__(self, listener):
        self.pages = {}
        self.requests = defaultdict(list)
        self.sent = defaultdict(int)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._ended = threading.Event()
        self._threads = []

    def page(self, path, *parts):
        """Serves the same parts at every request."""
        self.pages[path] = lambda number: parts

    def pages_in_turn(self, path, *answers):
        """Serves one answer after the other; the last one again and again."""
        self.pages[path] = lambda number: [answers[min(number, len(answers) - 1)]]

    def run(self, wrap):
        while not self._ended.is_set():
            with suppress(OSError):
                plain, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(plain, wrap), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _serve(self, plain, wrap):
        with suppress(OSError), wrap(plain) as connection:
            connection.settimeout(5)
            head = b""
            while b"\r\n\r\n" not in head:
                got = connection.recv(4096)
                if not got:
                    return
                head += got
            path = head.split(b" ", 2)[1].decode()
            self.requests[path].append(head.decode("latin-1"))
            page = self.pages.get(path.split("?")[0])
            if page is None:
                connection.sendall(answer(b"no", 404))
                return
            for part in page(len(self.requests[path]) - 1):
                if self._ended.is_set():
                    return
                if isinstance(part, bytes):
                    connection.sendall(part)
                    self.sent[path] += len(part)
                else:
                    self._ended.wait(part)

    def end(self):
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(2)


@contextmanager
def hostile_server(wrap=lambda plain: plain):
    """Yields a running server; `wrap` puts TLS around each connection."""
    server = HostileServer(socket.create_server(("127.0.0.1", 0)))
    runner = threading.Thread(target=server.run, args=(wrap,), daemon=True)
    runner.start()
    try:
        yield server
    finally:
        server.end()
        runner.join(2)


@dataclass
class World:
    """What the fakes were asked for, and what they answer.

    names: host -> the answers of the name server, one after the other, the last one for ever; an
    answer may be an exception. speed: seconds that pass for each real one. patient: pauses are
    waited for; else the clock jumps over them, and `waits` lists them. reachable: addresses that
    lead to the server.
    """

    server: HostileServer | None
    names: dict = field(default_factory=dict)
    speed: float = 1.0
    patient: bool = False
    free: int = 10**12
    reachable: tuple = (PUBLIC, OTHER)
    looked_up: list = field(default_factory=list)
    dialled: list = field(default_factory=list)
    waits: list = field(default_factory=list)

    def network(self):
        return Network(
            resolve=self._resolve,
            connect=self._connect,
            now=lambda: time.monotonic() * self.speed + sum(self.waits),
            pause=self._pause,
            free_bytes=self._free_bytes,
        )

    def _resolve(self, host, timeout_s):
        self.looked_up.append((host, timeout_s))
        answers = self.names.get(host, [[PUBLIC]])
        asked = sum(name == host for name, _ in self.looked_up)
        found = answers[min(asked, len(answers)) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    def _connect(self, address, port, timeout_s, server_hostname):
        self.dialled.append((address, port, server_hostname))
        if address == GONE:
            raise ConnectionRefusedError(111, "refused")
        assert address in self.reachable, f"a connection to {address} was asked for"
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=timeout_s)

    def _pause(self, seconds, stop):
        if self.patient:
            stop.wait(seconds)
        else:
            self.waits.append(seconds)

    def _free_bytes(self, folder):
        assert Path(folder).is_dir()
        return self.free
