"""The outside world as a fetch sees it: name server, sockets, clock and disk, each replaceable.

Differs from runpod's `rp_ssrf` guard, whose ideas (every address public, connection pinned to
them) are kept: that one stands on `requests`, which cannot be stopped while it waits, has no
limit on name lookups or total time, reads netrc, and would have to be installed.
"""

from __future__ import annotations

import ipaddress
import queue
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xicon_infer.media.address import is_public


class Connection(Protocol):
    """The part of a socket that a fetch uses."""

    def sendall(self, data: bytes, /) -> None:
        """Sends everything."""

    def recv_into(self, buffer: Any, /) -> int:
        """Fills a buffer with what has arrived; 0 at the end, TimeoutError after the timeout."""

    def settimeout(self, seconds: float, /) -> None:
        """Sets how long the other two may wait."""

    def close(self) -> None:
        """Ends the connection."""


class Resolver(Protocol):
    """Asks for the addresses of a host."""

    def __call__(self, host: str, timeout_s: float) -> list[str]:
        """Returns them in the order to be tried.

        Raises:
            TimeoutError: no answer in time.
            OSError: socket.gaierror where the name has none.
        """


class Connector(Protocol):
    """Opens a connection to one address."""

    def __call__(
        self, address: str, port: int, timeout_s: float, server_hostname: str | None
    ) -> Connection:
        """Returns it; with TLS and a certificate checked for `server_hostname`, if one is given.

        Raises:
            OSError: nobody answers, or the certificate is wrong.
        """


def resolve(host: str, timeout_s: float) -> list[str]:
    """Returns the addresses of a host as the system gives them.

    The system's lookup knows no time limit, so it runs in a thread that may outlive the wait.

    Raises:
        TimeoutError: no answer in time.
        OSError: socket.gaierror where the name has none.
    """
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except OSError as error:
            answers.put(error)
        except UnicodeError:  # a name that cannot be one
            answers.put(socket.gaierror(socket.EAI_NONAME, "not a name"))

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError("no answer from the name server") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def connector(context: Callable[[], ssl.SSLContext] = ssl.create_default_context) -> Connector:
    """Returns a `Connector` over TCP.

    Args:
        context: makes the TLS settings; the default trusts the system's authorities.
    """

    def connect(
        address: str, port: int, timeout_s: float, server_hostname: str | None
    ) -> Connection:
        plain = socket.create_connection((address, port), timeout=timeout_s)
        if server_hostname is None:
            return plain
        try:
            return context().wrap_socket(plain, server_hostname=server_hostname)
        except BaseException:
            plain.close()
            raise

    return connect


def may_connect(address: str) -> bool:
    """Returns True for an address that both our list and the standard library call public.

    The library's tables, which runpod's guard asks too, lack some private networks but know the
    whole IPv6 space that nobody was given, which some closed networks use.
    """
    if not is_public(address):
        return False
    parsed = ipaddress.ip_address(address)
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return parsed.is_global and not (parsed.is_reserved or parsed.is_multicast)


def pause(seconds: float, stop: threading.Event) -> None:
    """Returns after so many seconds, or as soon as `stop` is set."""
    stop.wait(seconds)


def free_bytes(folder: Path) -> int:
    """Returns the free space where a folder is."""
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class Network:
    """What a fetch uses of the machine. now: seconds of a clock that never goes back."""

    resolve: Resolver = resolve
    connect: Connector = connector()  # noqa: RUF009  holds no state
    now: Callable[[], float] = time.monotonic
    pause: Callable[[float, threading.Event], None] = pause
    free_bytes: Callable[[Path], int] = free_bytes


REAL = Network()
