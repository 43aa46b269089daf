"""The log of the worker: one JSON object a line, safe to keep.

The key `requestId` is that of the platform's own lines, so that its filters find ours. No line
holds credentials, base64, query strings, or a line break from a client.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

LEVELS: tuple[str, ...] = ("DEBUG", "INFO", "WARNING", "ERROR")
MAX_CHARACTERS = 256
"""Of one text; a client's text must not fill the log."""
MAX_TRACEBACK = 8192

_DATA = re.compile(r"data:[^,\s]{0,100},[^\s\"']*")
_QUERY = re.compile(
    r"(\b[a-z][a-z0-9+.-]{1,9}://)(?:[^/\s\"'@]*@)?([^\s\"'?#]*)[?#][^\s\"']*", re.I
)
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]{1,9}://)[^/\s\"'@?#]*@", re.I)
_BLOB = re.compile(r"[A-Za-z0-9+/_=-]{120,}")
_SHORTEST_SECRET = 4


class JsonLog:
    """Writes events.

    Args:
        write: gets each line without its end; standard output if None.
        level: the least level written.
        secrets: texts that no line may hold.
        now: seconds since 1970.
    """

    def __init__(
        self,
        write: Callable[[str], None] | None = None,
        *,
        level: str = "INFO",
        secrets: Collection[str] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._write = write or _to_stdout
        self._least = LEVELS.index(level)
        self._secrets = sorted((s for s in secrets if len(s) >= _SHORTEST_SECRET), key=len)[::-1]
        self._now = now

    def event(
        self, name: str, *, level: str = "INFO", request_id: str | None = None, **fields: Any
    ) -> None:
        """Writes one event; fields are JSON values, made safe here.

        A field named `traceback` may be long.
        """
        if LEVELS.index(level) < self._least:
            return
        time_text = datetime.fromtimestamp(self._now(), timezone.utc).isoformat("T", "milliseconds")
        line = {"ts": time_text, "level": level, "event": name, "requestId": request_id, **fields}
        safe = {key: self._safe(value, key) for key, value in line.items()}
        self._write(json.dumps(safe, default=str))

    def _safe(self, value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {self._text(str(k), 64): self._safe(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._safe(item) for item in value]
        if isinstance(value, (bool, int, float)) or value is None:
            return value
        return self._text(str(value), MAX_TRACEBACK if key == "traceback" else MAX_CHARACTERS)

    def _text(self, text: str, most: int) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return safe_text(text, most)


class Bridge(logging.Handler):
    """Passes what the package logs by Python's own means on to the log of the worker."""

    def __init__(self, log: JsonLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record as the event `log`."""
        level = "ERROR" if record.levelname not in LEVELS else record.levelname
        self._log.event("log", level=level, logger=record.name, message=record.getMessage())


def safe_text(text: str, most: int = MAX_CHARACTERS) -> str:
    """Returns a text without base64, credentials and queries of URLs, cut to a length."""
    text = text[: 64 * most]  # so that a giant text costs no time
    text = _DATA.sub("data:...", text)
    text = _QUERY.sub(r"\1\2", text)
    text = _USER.sub(r"\1", text)
    text = _BLOB.sub(lambda found: f"<{len(found[0])} characters>", text)
    return text if len(text) <= most else text[: most - 3] + "..."


def prompt_fields(prompt: str, *, shown: bool) -> dict[str, Any]:
    """Returns what is logged of a prompt: its length and hash; the text too where allowed."""
    digest = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:16]
    hidden: dict[str, Any] = {"prompt_characters": len(prompt), "prompt_sha256": digest}
    return hidden | ({"prompt": prompt} if shown else {})


def _to_stdout(line: str) -> None:
    # A closed pipe must not fail a job.
    with suppress(OSError, ValueError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
