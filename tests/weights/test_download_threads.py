"""Several files at once, several processes in one folder, and stopping in the middle."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest

from tests.weights.hub_server import REPO, Fault, serving, weights
from tests.weights.pull_case import BODY, Told, cdn, get, parts
from xicon_infer.errors import Cancelled, InvalidRequest
from xicon_infer.types import SilentProgress
from xicon_infer.weights.download import pull, target_path
from xicon_infer.weights.download_http import Stop
from xicon_infer.weights.download_threads import run_together
from xicon_infer.weights.places import locate


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path) as running:
        yield running


def test_files_are_fetched_at_the_same_time(server, tmp_path):
    items = [server.publish_web(f"{n}.bin", bytes([n]) * 40) for n in range(4)]
    for item in items:
        server.faults["GET", f"/web/{item.path}"] = [Fault(drip_s=0.005)]

    def seconds(jobs, folder):
        start = time.perf_counter()
        get(server, items, folder, jobs=jobs)
        return time.perf_counter() - start

    together = seconds(4, tmp_path / "a")
    for item in items:
        server.faults["GET", f"/web/{item.path}"] = [Fault(drip_s=0.005)]
    assert together < seconds(1, tmp_path / "b") - 0.2


@pytest.mark.parametrize("jobs", [0, 33, -1])
def test_jobs_out_of_range(server, tmp_path, jobs):
    with pytest.raises(InvalidRequest, match="allowed is 1 to 32") as caught:
        get(server, [], tmp_path, jobs=jobs)
    assert caught.value.field == "jobs"


@pytest.mark.parametrize("stopper", [Cancelled("stop"), KeyboardInterrupt()])
def test_stopping_keeps_what_has_arrived(server, tmp_path, stopper):
    items = [server.publish(f"{n}.safetensors", weights(1_500_000, n)) for n in range(3)]
    for item in items[:2]:
        body = server.hub[REPO, item.path].body
        server.faults[cdn(body)] = [Fault(close_after=1_000_000), Fault(drip_s=30.0)]

    class Stopping(Told):
        def step(self, done, total, unit="step"):
            super().step(done, total, unit)
            if done >= 2:
                self.stopped_at = time.perf_counter()
                raise stopper

    told = Stopping()
    with pytest.raises(type(stopper)):
        get(server, items, tmp_path, progress=told, jobs=2, transfer={"timeout_s": 60.0})
    assert time.perf_counter() - told.stopped_at < 1.0
    assert not [t for t in threading.enumerate() if t.name.startswith("download-")]
    assert [item for item in items[:2] if locate(item, [tmp_path])] == []
    kept = [path.stat().st_size for path in parts(tmp_path)]
    assert sum(kept) >= 2_000_000
    server.faults.clear()
    server.sent.clear()
    found = get(server, items, tmp_path)
    assert [one.state for one in found] == ["resumed", "resumed", "downloaded"]
    for one in found:
        assert one.path.read_bytes() == server.hub[REPO, one.entry.path].body
    assert sum(server.sent.values()) == sum(one.size_bytes for one in found) - sum(kept)


def test_stopping_while_the_servers_are_asked(server, tmp_path):
    item = server.publish_web("a.onnx", b"\x08")
    server.faults["HEAD", "/web/a.onnx"] = [Fault(status=503)] * 9
    start = time.perf_counter()
    with pytest.raises(Cancelled):
        get(server, [item], tmp_path, progress=Told(stop_at=0), transfer={"backoff_s": (60.0,)})
    assert time.perf_counter() - start < 2.0


def test_a_bug_in_a_thread_is_not_swallowed():
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_together([broken, lambda: 1], jobs=2, stop=Stop(), tick=lambda: None)


def _pull_alone(item, folder, transfer, queue):
    queue.put(pull([item], folder, progress=SilentProgress(), transfer=transfer)[0].state)


def test_two_processes_pull_into_one_folder(server, tmp_path):
    item = server.publish("a.safetensors", BODY)
    server.faults[cdn(BODY)] = [Fault(close_after=500_000), Fault(drip_s=0.0)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    transfer = server.transfer(backoff_s=(0.3, 0.3))
    workers = [
        context.Process(target=_pull_alone, args=(item, tmp_path, transfer, queue))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    states = sorted(queue.get(timeout=20) for _ in workers)
    for worker in workers:
        worker.join()
    assert states == ["downloaded", "present", "present"]
    assert target_path(item, tmp_path).read_bytes() == BODY
    assert server.sent[cdn(BODY)] == len(BODY)
    assert parts(tmp_path) == []


def test_a_killed_process_leaves_what_the_next_one_takes_up(server, tmp_path):
    item = server.publish("a.safetensors", BODY)
    server.faults[cdn(BODY)] = [Fault(close_after=800_000), Fault(drip_s=30.0)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(
        target=_pull_alone, args=(item, tmp_path, server.transfer(timeout_s=60.0), queue)
    )
    worker.start()
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size > 800_000 for path in parts(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.kill()
    worker.join()
    server.sent.clear()
    assert get(server, [item], tmp_path)[0].state == "resumed"
    assert server.sent[cdn(BODY)] < len(BODY) - 800_000 + 1
    assert target_path(item, tmp_path).read_bytes() == BODY
