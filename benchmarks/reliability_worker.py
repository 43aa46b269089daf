"""The worker of the reliability figures: the real one, with faults and stops put in from outside.

Run by `benchmarks.reliability`, not by hand. A request carries its fault in `metadata`:
{"fault": "oom" | "bug" | "disk"} fails in the owner's judge, {"cancel_s": seconds} is stopped like
the platform stops a job, by a cancelled task.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from xicon_infer.errors import OutOfMemory
from xicon_infer.worker_start import run_worker

Handler = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


def judge(stage: str, request: dict[str, Any], video: Path | None) -> str | None:
    """Fails as the request says; named by XICON_MODERATION."""
    fault = (request.get("metadata") or {}).get("fault")
    if fault == "oom":
        raise OutOfMemory("injected")
    if fault == "bug" and stage == "result":
        raise KeyError("injected")
    if fault == "disk" and stage == "result":
        raise OSError(errno.ENOSPC, "injected")
    return None


class Stopping:
    """The SDK, with a handler that stops the jobs that ask for it."""

    def __init__(self, serverless: Any) -> None:
        self.register_fitness_check = serverless.register_fitness_check
        self._serverless = serverless

    def start(self, config: dict[str, Any]) -> None:
        """Starts the SDK."""
        self._serverless.start({"handler": stopping(config["handler"])})


def stopping(handler: Handler) -> Handler:
    """Returns a handler that cancels a job after its `cancel_s`."""

    async def handle(event: Mapping[str, Any]) -> dict[str, Any]:
        given = event.get("input")
        wish = given.get("metadata") if isinstance(given, dict) else None
        task = asyncio.ensure_future(handler(event))
        if isinstance(wish, dict) and "cancel_s" in wish:
            await asyncio.wait({task}, timeout=wish["cancel_s"])
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return {"error": "stopped by the platform [CANCELLED]"}

    return handle


def main() -> int:
    """Starts the worker."""
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "ERROR")
    import runpod

    return run_worker(Stopping(runpod.serverless), env=os.environ, argv=sys.argv)


if __name__ == "__main__":
    sys.exit(main())
