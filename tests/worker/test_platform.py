"""The real SDK with the real handler in a process of its own, against a platform on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.platform_server import Platform

ROOT = Path(__file__).parents[2]
HANG_S = 240
"""Only a hang lasts so long; the machine may be busy."""
T2V = {"mode": "wan_t2v", "prompt": "fox", "width": 128, "height": 128, "num_frames": 1, "steps": 2}
LONG = T2V | {"steps": 100, "num_frames": 321, "width": 256, "height": 256}


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XICON_PRESET": "tiny",
        "XICON_MODES": "wan_t2v",
        "XICON_TMP": str(folder / "tmp"),
        "NETWORK_VOLUME_PATH": str(folder / "volume"),
        **more,
    }


def handler(env, *words) -> list[str]:
    return [sys.executable, str(ROOT / "handler.py"), *words]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """Yields a platform with a worker that is ready, its process and its log."""
    folder = tmp_path_factory.mktemp("worker")
    left = folder / "tmp" / "xicon-job-0123"
    left.mkdir(parents=True)
    platform = Platform()
    env = environment(folder, **platform.environment)
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(handler(env), env=env, cwd=folder, stdout=out, stderr=out)
    platform.jobs.put({"id": "first", "input": T2V | {"seed": 4}})
    try:
        yield platform, process, log
    finally:
        process.kill()
        process.wait()
        platform.close()


def lines(log: Path) -> list[dict]:
    """Returns our own lines of the log; the SDK writes others between them."""
    ours = [line for line in log.read_text().splitlines() if line.startswith('{"ts"')]
    return [json.loads(line) for line in ours]


@pytest.mark.slow
def test_a_worker_lives_on_the_platform(worker):
    """One process for all of it, because its start is what takes the time."""
    platform, process, log = worker
    result = platform.result("first", HANG_S)
    assert result is not None, log.read_text()[-3000:]
    assert result["output"]["status"] == "success"
    assert result["output"]["metadata"]["seed"] == 4
    events = [line["event"] for line in lines(log)]
    assert "start.cleaned" in events, "what an earlier process left is removed"
    assert events.index("ready") < events.index("job.accepted")

    # Progress came before the result, and none after it.
    mine = [kind for kind, name, _ in platform.heard if name == "first"]
    assert mine[-1] == "result"
    assert mine.count("result") == 1
    assert "progress" in mine
    stages = [v["stage"] for k, name, v in platform.heard if name == "first" and k == "progress"]
    assert "fetch" in stages

    # A refused request ends at once, with a text the platform understands.
    platform.jobs.put({"id": "bad", "input": {"mode": "wan_t2v"}})
    refused = platform.result("bad", HANG_S)
    assert refused["error"] == "Missing 'prompt' parameter [MISSING_FIELD]"
    assert refused["output"]["error_code"] == "MISSING_FIELD"

    # A job that is stopped leaves the device before the next one begins, and has no result.
    platform.jobs.put({"id": "long", "input": LONG})
    busy = platform.wait(
        lambda h: h[:2] == ("progress", "long") and h[2]["stage"] == "denoise", HANG_S
    )
    assert busy is not None
    platform.jobs.put({"id": "after", "input": T2V})
    platform.stops.put("long")
    assert platform.result("after", HANG_S)["output"]["status"] == "success"
    assert not [h for h in platform.heard if h[:2] == ("result", "long")]
    events = [(line["event"], line["requestId"]) for line in lines(log)]
    cancelled = events.index(("job.cancelled", "long"))
    assert cancelled < events.index(("job.accepted", "after"))

    # The same job again is answered without being made again.
    platform.heard.clear()
    platform.jobs.put({"id": "first", "input": T2V | {"seed": 4}})
    assert platform.result("first", HANG_S)["output"] == result["output"]
    assert ("job.redelivered", "first") in [(e["event"], e["requestId"]) for e in lines(log)]

    # Told to stop, it gives the running job back with a reason, and ends.
    platform.jobs.put({"id": "last", "input": LONG})
    busy = platform.wait(
        lambda h: h[:2] == ("progress", "last") and h[2]["stage"] == "denoise", HANG_S
    )
    assert busy is not None
    process.send_signal(signal.SIGTERM)
    assert platform.result("last", HANG_S)["output"]["error_code"] == "WORKER_STOPPING"
    assert process.wait(HANG_S) == 0
    tmp = log.parent / "tmp"
    assert [path.name for path in tmp.iterdir()] == [], "no folder of a job is left"
    assert "key-of-the-test" not in log.read_text()


def test_a_worker_that_cannot_start_tells_the_platform_why(tmp_path):
    platform = Platform()
    env = environment(tmp_path, **platform.environment, XICON_MAX_FRAMES="many")
    try:
        done = subprocess.run(
            handler(env), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S
        )
    finally:
        platform.close()
    assert done.returncode == 1
    assert ("unhealthy", "worker_start") in [heard[:2] for heard in platform.heard]
    assert "XICON_MAX_FRAMES" in platform.heard[-1][2]


def test_one_job_from_the_command_line(tmp_path):
    env = environment(tmp_path, XICON_WARMUP="0")
    words = ("--test_input", json.dumps({"input": {"action": "health"}}))
    done = subprocess.run(
        handler(env, *words), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "'jobs_done': 0" in done.stdout
    assert "completed successfully" in done.stdout
