"""Stands in for what the worker asks of others: a clock, jobs, and the SDK."""

from __future__ import annotations

import json
import threading

from xicon_infer import response
from xicon_infer.errors import InvalidRequest
from xicon_infer.request import Request
from xicon_infer.worker import Limits, Worker
from xicon_infer.worker_log import JsonLog
from xicon_infer.worker_metrics import Metrics

WAIT_S = 20.0
"""Longest wait for something that happens at once; only a hang lasts so long."""


class Clock:
    """Shows the time that a test gave it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeJobs:
    """Jobs that do what their input says.

    input: {"do": name of a method below, ...}. events: what happened, in order.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.running = self.most = self.made = 0
        self.started, self.go_on = threading.Event(), threading.Event()
        self.done_codes: list[tuple[str, bool]] = []

    def parse(self, event):
        given = event["input"]
        if given.get("do") == "refuse":
            raise InvalidRequest("no", field="do")
        return Request(
            event["id"], "native", resolved=given, timeout_s=given.get("timeout_s", 1000)
        )

    def quick(self, request):
        return {"status": "healthy"} if request.resolved.get("do") == "health" else None

    def make(self, request, flag, progress):
        self.running += 1
        self.made += 1
        self.most = max(self.most, self.running)
        self.events.append(f"start {request.id}")
        try:
            return getattr(self, request.resolved["do"])(request, flag, progress)
        finally:
            self.running -= 1
            self.events.append(f"end {request.id}")

    def failure(self, error, request_id, stage):
        return response.failure(error, request_id=request_id, stage=stage)

    def after(self, answer, *, worked):
        self.done_codes.append((answer.get("error_code", ""), worked))
        return answer

    def quickly(self, request, flag, progress):
        return {"status": "success", "made": self.made}

    def when_told(self, request, flag, progress):
        self.started.set()
        assert self.go_on.wait(WAIT_S)
        return {"status": "success", "made": self.made}

    def until_stopped(self, request, flag, progress):
        self.started.set()
        for step in range(10**9):
            progress.step(step, 10**9)
            self.go_on.wait(0.001)
        raise AssertionError("nobody stopped the job")

    def never_checks(self, request, flag, progress):
        self.started.set()
        self.go_on.wait(WAIT_S)
        return {"status": "success"}

    def breaks(self, request, flag, progress):
        with progress.stage("sample"):
            raise ValueError("secret path /root/x")

    def reports(self, request, flag, progress):
        for name in ("fetch", "sample", "upload"):
            with progress.stage(name):
                progress.step(1, 2)
        return {"status": "success"}


def lines(written: list[str]) -> list[dict]:
    return [json.loads(line) for line in written]


def make_worker(jobs, **options):
    """Returns a worker and the lines of its log."""
    written: list[str] = []
    options.setdefault("exit", lambda code: written.append(json.dumps({"event": f"exit {code}"})))
    worker = Worker(
        jobs,
        log=JsonLog(written.append, level="DEBUG"),
        metrics=Metrics(),
        limits=options.pop("limits", Limits(job_s=1000, grace_s=WAIT_S)),
        **options,
    )
    return worker, written
