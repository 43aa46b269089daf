"""Answers kept for a while, so that a job that comes twice is not made twice.

The platform sends a job again when it believes that the answer was lost. Only successes are kept:
what failed is worth another try.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 32_000_000
"""Of all kept answers together; one with a video inside has up to 19 MB."""
MAX_ANSWERS = 64
KEPT_S = 1800.0
"""As long as the platform keeps a result."""


@dataclass(frozen=True)
class _Kept:
    fingerprint: str
    text: str
    until: float


class KeptAnswers:
    """The last answers by job id.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answers: OrderedDict[str, _Kept] = OrderedDict()

    def find(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the answer to the same job with the same input, or None."""
        kept = self._answers.get(_name(event))
        if kept is None or kept.until < self._clock() or kept.fingerprint != fingerprint(event):
            return None
        return dict(json.loads(kept.text))

    def keep(self, event: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Keeps a successful answer, and lets the oldest go where there is no room."""
        name = _name(event)
        text = json.dumps(answer)
        if not name or "error" in answer or len(text) > MAX_BYTES:
            return
        self._answers.pop(name, None)
        self._answers[name] = _Kept(fingerprint(event), text, self._clock() + KEPT_S)
        while len(self._answers) > MAX_ANSWERS or self.bytes > MAX_BYTES:
            self._answers.popitem(last=False)

    @property
    def bytes(self) -> int:
        """Size of all kept answers."""
        return sum(len(kept.text) for kept in self._answers.values())

    def __len__(self) -> int:
        return len(self._answers)


def fingerprint(event: Mapping[str, Any]) -> str:
    """Returns a hash of the input: another request under the same id is another job."""
    text = json.dumps(event.get("input"), sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _name(event: Mapping[str, Any]) -> str:
    name = event.get("id")
    return name if isinstance(name, str) else ""
