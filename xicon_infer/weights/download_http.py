"""HTTP for large files: requests that can be stopped at once, and redirects that stay safe.

Built on urllib, so proxies and certificates follow the usual environment variables. Nothing is
retried here: what may be tried again raises `Broken`, an answer that is final raises `Status`.
Neither leaves this package; callers turn them into a `WeightsError` that names the file.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from xicon_infer.errors import Cancelled, WeightsError

Answer = TypeVar("Answer")

_BLOCK_BYTES = 1 << 20
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another attempt may not give."""
_MAX_RETRY_AFTER_S = 60.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Broken(Exception):
    """The network failed in a way that another attempt may not.

    retry_after_s: seconds that the server asks to wait.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Status(Exception):
    """The server's final answer is an error: its status code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the server answered {code}")
        self.code = code


class Stop:
    """One switch that ends every transfer of a pull, also those that wait for bytes."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def set(self) -> None:
        """Ends waiting and reading everywhere."""
        self._event.set()
        with self._lock:
            for connected in list(self._sockets):
                _shut(connected)

    def is_set(self) -> bool:
        """Returns whether the transfers are to end."""
        return self._event.is_set()

    def check(self) -> None:
        """Raises Cancelled if the transfers are to end."""
        if self._event.is_set():
            raise Cancelled("the download was stopped; what has arrived is kept for the next time")

    def wait(self, seconds: float) -> None:
        """Returns after so many seconds, or raises Cancelled as soon as it is set."""
        self._event.wait(seconds)
        self.check()

    def watch(self, connected: socket.socket) -> None:
        """Makes `set` wake a thread that reads from this socket."""
        with self._lock:
            self._sockets.add(connected)
        if self.is_set():
            _shut(connected)


def free_bytes(folder: Path) -> int:
    """Returns the free space where a folder is, or will be made."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def write_all(file: BinaryIO, block: bytes) -> None:
    """Writes a whole block to an unbuffered file, which may take it in pieces."""
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


@dataclass(frozen=True)
class Transfer:
    """How the network and the disk are used.

    timeout_s: seconds without an answer, or below `min_rate`, after which a connection is given
    up. min_rate: bytes per second. backoff_s: waits before the second attempt and those after it;
    their number bounds the attempts that bring nothing new. endpoint: address of the hub; None
    for what huggingface_hub takes (HF_ENDPOINT). free_bytes, write: the disk.
    """

    timeout_s: float = 30.0
    min_rate: float = 1024.0
    backoff_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    endpoint: str | None = None
    free_bytes: Callable[[Path], int] = free_bytes
    write: Callable[[BinaryIO, bytes], None] = write_all


def open_url(
    url: str, headers: dict[str, str], *, method: str = "GET", transfer: Transfer, stop: Stop
) -> http.client.HTTPResponse:
    """Returns the answer to one request, redirects followed; the caller closes it.

    Raises:
        Broken: no answer, or one that may be another next time.
        Status: the server refuses.
        WeightsError: a redirect leads to an unsafe address.
        Cancelled: `stop` is set.
    """
    stop.check()
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        answer: http.client.HTTPResponse = _opener(stop).open(request, timeout=transfer.timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _RETRIED:
            raise Broken(
                f"the server answered {error.code}", retry_after_s(error.headers)
            ) from error
        raise Status(error.code) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _network_error(error, stop) from error
    return answer


def read_blocks(
    answer: http.client.HTTPResponse, num_bytes: int | None, *, transfer: Transfer, stop: Stop
) -> Iterator[bytes]:
    """Yields what arrives, until so many bytes came or the connection ends.

    Args:
        answer: from `open_url`.
        num_bytes: at most this many; None for all.
        transfer: gives the time limit.
        stop: ends it.

    Raises:
        Broken: the connection fails, or is slower than `transfer.min_rate`.
        Cancelled: `stop` is set.
    """
    seconds, received = 0.0, 0
    while num_bytes is None or num_bytes > 0:
        start = time.monotonic()
        try:
            block = answer.read1(min(_BLOCK_BYTES, num_bytes or _BLOCK_BYTES))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _network_error(error, stop) from error
        stop.check()
        if not block:
            return
        yield block
        num_bytes = None if num_bytes is None else num_bytes - len(block)
        # Only reading is timed: a slow disk is no reason to connect again.
        seconds, received = seconds + time.monotonic() - start, received + len(block)
        if seconds >= transfer.timeout_s:
            if received < transfer.min_rate * seconds:
                raise Broken(f"the server sends only {received / seconds:.0f} bytes a second")
            seconds, received = 0.0, 0


def retry(action: Callable[[], Answer], *, transfer: Transfer, stop: Stop) -> Answer:
    """Returns what `action` returns, tried again after each `Broken` as often as allowed.

    Raises:
        Broken: the last attempt failed too.
        Cancelled: `stop` is set.
    """
    for wait_s in transfer.backoff_s:
        stop.check()
        try:
            return action()
        except Broken as error:
            stop.wait(max(wait_s, error.retry_after_s))
    return action()


def retry_after_s(headers: Mapping[str, str] | Message) -> float:
    """Returns the seconds of a Retry-After header, at most a minute; dates count as 0."""
    text = headers.get("Retry-After") or ""
    return min(float(text), _MAX_RETRY_AFTER_S) if text.isdigit() else 0.0


def status_reason(code: int) -> str:
    """Returns what an error status means for somebody who wants a file."""
    if code in (401, 403):
        return f"the server refuses access ({code}); the file may need a login or have moved"
    if code in (404, 410):
        return f"there is nothing at its address ({code}); look for a newer list of weights"
    if 300 <= code < 400:
        return f"the redirects lead in a circle or nowhere ({code}); try again later"
    return f"the server answered {code}; try again later"


def check_redirect(old: str, new: str) -> None:
    """Raises WeightsError for a redirect that gives up encryption or leaves HTTP."""
    before, after = urlsplit(old).scheme, urlsplit(new).scheme
    if after not in ("http", "https") or (before == "https" and after != "https"):
        raise WeightsError(
            f"{without_query(old)} redirects from {before} to {after}, which is not safe; "
            "nothing was fetched. Fetch the file by hand if you trust the place."
        )


def without_query(url: str) -> str:
    """Returns an address without its query, which may hold a signature or a token."""
    return url.split("?", 1)[0]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows safe redirects, and keeps the access token on the host it was meant for."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request:
        """Returns the next request."""
        try:
            check_redirect(req.full_url, newurl)
        except WeightsError:
            fp.close()
            raise
        same = _origin(req.full_url) == _origin(newurl)
        kept = {k: v for k, v in req.headers.items() if same or k.lower() != "authorization"}
        return urllib.request.Request(
            newurl, headers=kept, method=req.get_method(), unverifiable=True
        )

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # unknown to Python 3.10


class _PlainConnection(http.client.HTTPConnection):
    def __init__(self, host: str, *, stop: Stop, **options: Any) -> None:
        super().__init__(host, **options)
        self._stop = stop

    def connect(self) -> None:
        super().connect()
        self._stop.watch(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, host: str, *, stop: Stop, **options: Any) -> None:
        super().__init__(host, **options)
        self._stop = stop

    def connect(self) -> None:
        super().connect()
        self._stop.watch(self.sock)


class _PlainHandler(urllib.request.HTTPHandler):
    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self._stop = stop

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_PlainConnection, stop=self._stop), req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self._stop = stop

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        context = ssl.create_default_context()
        return self.do_open(partial(_SecureConnection, stop=self._stop), req, context=context)


def _opener(stop: Stop) -> urllib.request.OpenerDirector:
    """Returns an opener for http and https alone: no file, ftp or data address is followed."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _PlainHandler(stop),
        _SecureHandler(stop),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _network_error(error: Exception, stop: Stop) -> Exception:
    """Returns what a failed connection means: stopped by us, not to be trusted, or broken."""
    if stop.is_set():
        return Cancelled("the download was stopped")
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return WeightsError(f"the server's certificate is not valid: {reason.verify_message}")
    if isinstance(reason, TimeoutError):
        return Broken("the server does not answer in time")
    return Broken(f"the connection failed: {reason or type(error).__name__}")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)


def _shut(connected: socket.socket) -> None:
    with suppress(OSError):
        # The plain shutdown: the one of a TLS socket takes away the object that a reader uses.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
