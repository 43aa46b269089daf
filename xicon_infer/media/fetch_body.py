"""The bytes of an HTTP answer: every wait bounded, no length believed, decompressed if need be.

A sender may lie about the length, send a byte an hour, never end, or pack gigabytes of zeros into
a few bytes. None of that costs more than the limits.
"""

from __future__ import annotations

import http.client
import io
import zlib
from collections.abc import Iterator
from typing import Any

from xicon_infer.media.fetch_network import Connection
from xicon_infer.media.fetch_sink import BLOCK_BYTES, Intake, Sink

ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
"""Content codings that are understood; only identity is asked for."""

_HEAD_BYTES = 256 * 1024
"""Of status line and headers; browsers give up at about as many."""
_SLICE_S = 0.1
"""How soon a wait for bytes notices that the fetch is to end."""
_ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS


class Broken(Exception):
    """One try failed in a way that another may not; the text says how.

    code: of the error, if no try is left. wait_s: what the server asks for.
    """

    def __init__(self, text: str, *, code: str = "FETCH_FAILED", wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.code = code
        self.wait_s = wait_s


class Wire:
    """A connection as `http.client` wants it; whoever opened it closes it."""

    def __init__(self, connection: Connection, intake: Intake) -> None:
        self._connection = connection
        self._stream = _Stream(connection, intake)

    def sendall(self, data: bytes) -> None:
        """Sends everything."""
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Returns the stream of what arrives."""
        return io.BufferedReader(self._stream, BLOCK_BYTES)

    def close(self) -> None:
        """Does nothing: the answer is read after http.client has let go."""

    def head_done(self) -> None:
        """Says that headers are read, so that what follows is bounded by other limits."""
        self._stream.head_left = None


class _Stream(io.RawIOBase):
    """What arrives, waited for in slices. head_left: bytes that headers may still take."""

    def __init__(self, connection: Connection, intake: Intake) -> None:
        super().__init__()
        self._connection, self._intake = connection, intake
        self.head_left: int | None = _HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._receive(buffer)
        if self.head_left is not None:
            self.head_left -= count
            if self.head_left < 0:
                raise http.client.HTTPException("endless headers")
        return count

    def _receive(self, buffer: Any) -> int:
        intake = self._intake
        gap_s = intake.limits.gap_s
        started = intake.network.now()
        while True:
            intake.check()
            left_s = min(intake.left_s(), started + gap_s - intake.network.now())
            if left_s <= 0:
                text = f"its server sent nothing for {gap_s:g} s"
                raise Broken(text, code="FETCH_TIMEOUT")
            self._connection.settimeout(min(_SLICE_S, left_s))
            try:
                return self._connection.recv_into(buffer)
            except TimeoutError:
                continue


def read_blocks(answer: http.client.HTTPResponse, sink: Sink) -> Iterator[bytes]:
    """Yields a body as it arrives.

    Of a body longer than announced the rest is not read.

    Args:
        answer: its headers read.
        sink: told the announced length; its limit also holds for what is received.

    Raises:
        Broken: the body is shorter than announced, or missing.
        MediaError: MEDIA_TOO_LARGE or DISK_FULL.
    """
    announced = answer.length
    if announced is not None:
        sink.announce(announced)
    received = 0
    while block := answer.read1(BLOCK_BYTES):
        received += len(block)
        sink.bound(received)
        yield block
    # An answer that breaks off within its headers looks like one without a body.
    if received < (1 if announced is None else announced):
        raise Broken("its server ended it early")


def decoded(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Yields what a body stands for, in pieces of bounded size however much was packed.

    Args:
        blocks: the body as received.
        encoding: one of `ENCODINGS`.

    Raises:
        Broken: the compressed data are damaged or end early.
    """
    if encoding in ("", "identity"):
        yield from blocks
        return
    unpack = zlib.decompressobj(_ZLIB_OR_GZIP)
    try:
        for block in blocks:
            rest = block
            while rest and not unpack.eof:
                yield unpack.decompress(rest, BLOCK_BYTES)
                rest = unpack.unconsumed_tail
        while piece := unpack.decompress(b"", BLOCK_BYTES):
            yield piece
    except zlib.error as error:
        raise Broken("its server compressed it wrongly") from error
    if not unpack.eof:
        raise Broken("its server ended it early")
