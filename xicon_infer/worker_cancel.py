"""The flag that stops one job: from the platform, from its own time limit, or from a signal.

Whoever does the work asks `check` between two pieces of it. The flag is plain attributes without a
lock, because a signal handler sets it in the middle of anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from xicon_infer.errors import Cancelled

CANCELLED, TIMEOUT, STOPPING = "CANCELLED", "JOB_TIMEOUT", "WORKER_STOPPING"

_MESSAGES = {
    CANCELLED: "The job was cancelled; nothing was made",
    STOPPING: "The worker was stopped before the job ended; send the request again",
}


class CancelFlag:
    """Stops one job.

    Args:
        clock: gives seconds; never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.code = ""
        self._clock = clock
        self._limit_s = math.inf
        self._end = math.inf
        self._later = ("", math.inf)

    def limit(self, seconds: float) -> None:
        """Ends the job with JOB_TIMEOUT that many seconds from now."""
        self._limit_s, self._end = seconds, self._clock() + seconds

    def stop(self, code: str = CANCELLED) -> None:
        """Ends the job at its next check; the first reason stays."""
        self.code = self.code or code

    def stop_in(self, code: str, seconds: float) -> None:
        """Ends the job at its first check that many seconds from now, unless it ended by then."""
        self._later = (code, self._clock() + seconds)

    @property
    def reason(self) -> str:
        """The code to end with now, "" to go on."""
        if self.code:
            return self.code
        now = self._clock()
        code, moment = self._later
        if now >= moment:
            return code
        return TIMEOUT if now >= self._end else ""

    def check(self) -> None:
        """Does nothing while the job may go on.

        Raises:
            Cancelled: with code CANCELLED, JOB_TIMEOUT or WORKER_STOPPING.
        """
        if reason := self.reason:
            raise self.error(reason)

    def error(self, code: str) -> Cancelled:
        """Returns what is raised for a reason."""
        timeout = (
            f"The job ran longer than its limit of {self._limit_s:g} s; use fewer frames or steps, "
            "a smaller size, or a larger 'timeout_s'"
        )
        field = "timeout_s" if code == TIMEOUT else None
        return Cancelled(_MESSAGES.get(code, timeout), field=field, code=code)
