"""Talks to one `benchmarks.dit_worker`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from threading import Timer
from typing import Any

from benchmarks.dit_worker import MARK
from benchmarks.machine import ROOT


class WorkerFailed(Exception):
    """A candidate's process ended or took too long; says what it printed last."""


class Process:
    """A started worker.

    Call `answer` once before the first `ask`: it waits until the model is built.

    Args:
        name: of the candidate.
        args: command line of `benchmarks.dit`.
        worker: command that is started; the real one by default.
    """

    def __init__(
        self, name: str, args: argparse.Namespace, worker: Sequence[str] | None = None
    ) -> None:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        options = ["--candidate", name, "--device", args.device, "--layers", str(args.layers)]
        options += ["--tiny"] if args.tiny else []
        self.process = subprocess.Popen(
            worker or [sys.executable, "-m", "benchmarks.dit_worker", *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, order: dict[str, Any], limit: float) -> dict[str, Any]:
        """Returns the answer to an order.

        Raises:
            WorkerFailed: there is none within `limit` seconds.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self.last_words()) from None
        return self.answer(limit)

    def answer(self, limit: float) -> dict[str, Any]:
        """Returns the next answer; the process is ended after `limit` seconds.

        Raises:
            WorkerFailed: there is none.
        """
        assert self.process.stdout is not None
        timer = Timer(max(limit, 0.0), self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
        finally:
            expired = not timer.is_alive()
            timer.cancel()
        self.process.wait()
        raise WorkerFailed("no time was left" if expired else self.last_words())

    def last_words(self) -> str:
        """Returns the last line that the process wrote to its standard error."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return lines[-1][:400] if lines else f"it ended with {self.process.poll()}"

    def close(self) -> None:
        """Ends the process."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                with suppress(BrokenPipeError):  # what was not yet sent is of no use any more
                    stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()
