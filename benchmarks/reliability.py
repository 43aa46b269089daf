"""How the worker bears a long life: many jobs, sudden death, and nonsense.

    python -m benchmarks.reliability --folder /tmp/r --out benchmarks/results/reliability.json
    python -m benchmarks.reliability --folder /tmp/r --jobs 60 --kills 5 --fuzz 2000

Soak: jobs of all forms through the SDK's local API in one process, from two clients at once; a
tenth is cancelled, a tenth is bad, one in twenty fails on the way. Counted: answers that are
missing or wrong, the order, resident memory, open files, folders left. Memory is fitted by a line
over the second half, after what is kept once is there.
Kills: the process is killed (SIGKILL) at a random moment, results going to a folder; every file in
it must then be a whole video, and the next start must remove what is left over.
Fuzz: random requests through the validator and on to the options of a job; anything but the
package's own error counts.

Tiny networks on a CPU: the numbers say nothing about speed or about device memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pose_render import commit, processor
from benchmarks.reliability_requests import Samples, nonsense
from xicon_infer.errors import InvalidRequest, XiconError
from xicon_infer.job import make_job
from xicon_infer.media.video import probe
from xicon_infer.request import RequestContext, parse_request, to_job_values
from xicon_infer.settings import read_settings

MODES = "scail,wan_t2v"
START_S = 600.0
ANSWER_S = 600.0
CLIENTS = 2


class Process:
    """A worker behind the SDK's local API.

    Args:
        folder: for its temporary files, results and log.
        samples: with the pose networks.
    """

    def __init__(self, folder: Path, samples: Samples) -> None:
        self.tmp, self.volume = folder / "tmp", folder / "volume"
        self.volume.mkdir(exist_ok=True)
        self.log = folder / "worker.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XICON_PRESET": "tiny",
            "XICON_MODES": MODES,
            "XICON_MODELS_DIR": str(samples.models),
            "XICON_CACHE_DIR": str(folder / "cache"),
            "XICON_TMP": str(self.tmp),
            "NETWORK_VOLUME_PATH": str(self.volume),
            "XICON_MODERATION": "benchmarks.reliability_worker:judge",
        }
        words = [sys.executable, "-m", "benchmarks.reliability_worker", "--rp_serve_api"]
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [*words, "--rp_api_port", str(self.port)], env=env, stdout=out, stderr=out
            )

    def ready(self) -> None:
        """Returns when the API answers."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with socket.socket() as caller:
                if caller.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the worker did not start, see {self.log}")

    def ask(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer of the API to one input."""
        body = json.dumps({"input": given}).encode()
        url = f"http://127.0.0.1:{self.port}/runsync"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return dict(json.load(answer))

    def usage(self) -> dict[str, int]:
        """Returns resident bytes, open files and threads of the process."""
        root = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines())
        return {
            "rss_bytes": int(status["VmRSS"].split()[0]) * 1024,
            "open_files": len(list((root / "fd").iterdir())),
            "threads": int(status["Threads"]),
        }

    def left(self) -> list[str]:
        """Returns the names in the folder of the jobs."""
        return sorted(path.name for path in self.tmp.glob("*"))

    def end(self, number: int = signal.SIGTERM) -> None:
        """Ends the process."""
        self.process.send_signal(number)
        self.process.wait()


def plan(number: int, samples: Samples, chance: random.Random) -> tuple[str, dict[str, Any]]:
    """Returns what is to happen to a job, and its input: 10 % stopped, 10 % bad, 5 % broken."""
    kind = number % 20
    if kind in (3, 13):
        wish = {"cancel_s": round(chance.uniform(0.0, 3.0), 3)}
        return "cancelled", samples.long(number) | {"metadata": wish}
    if kind in (7, 17):
        return "bad", samples.bad(number // 10)
    if kind == 11:
        return "faulty", samples.faulty(number // 20)
    return "good", samples.good(number)


def is_right(kind: str, number: int, answer: dict[str, Any]) -> bool:
    """Returns True if a job of that kind got the answer that belongs to it."""
    if kind == "good":
        told = answer.get("output", {})
        return told.get("status") == "success" and told["metadata"]["seed"] == number
    error = str(answer.get("error", ""))
    if kind == "cancelled":
        return error.endswith("[CANCELLED]")
    # Some bad ones cost nothing and some faults are found late: both must have a code.
    return answer.get("status") == "FAILED" and error.endswith("]")


def soak(folder: Path, samples: Samples, jobs: int, chance: random.Random) -> dict[str, Any]:
    """Returns what happened to many jobs in one process."""
    worker = Process(folder, samples)
    worker.ready()
    outcomes: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    used: list[dict[str, int]] = []
    guard = threading.Lock()
    planned = [(number, *plan(number, samples, chance)) for number in range(jobs)]

    def one(number: int, kind: str, given: dict[str, Any]) -> None:
        answer = worker.ask(given)
        with guard:
            outcomes[kind] += 1
            if not is_right(kind, number, answer):
                wrong.append({"job": number, "kind": kind, "answer": str(answer)[:400]})
            used.append(worker.usage())

    start = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda item: one(*item), planned))
    seconds = time.monotonic() - start
    left = worker.left()
    worker.end()
    rss = np.array([u["rss_bytes"] for u in used], float)
    late = slice(jobs // 2, None)
    slope = float(np.polyfit(np.arange(jobs)[late], rss[late], 1)[0]) if jobs > 3 else 0.0
    return {
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "kinds": dict(outcomes),
        "lost_or_wrong": len(wrong),
        "examples": wrong[:5],
        "order_kept": order_kept(worker.log),
        "rss_bytes": {"first": int(rss[0]), "middle": int(rss[jobs // 2]), "last": int(rss[-1])},
        "rss_slope_bytes_per_job": round(slope),
        "open_files": {"first": used[0]["open_files"], "last": used[-1]["open_files"]},
        "threads": {"first": used[0]["threads"], "last": used[-1]["threads"]},
        "folders_left": left,
    }


def order_kept(log: Path) -> bool:
    """Returns True if jobs began in the order in which they were accepted."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"ts"')]
    begun = [x["requestId"] for x in lines if x["event"] == "job.stage" and x["stage"] == "fetch"]
    accepted = [x["requestId"] for x in lines if x["event"] == "job.accepted"]
    return begun == [name for name in accepted if name in set(begun)]


def kills(folder: Path, samples: Samples, number: int, chance: random.Random) -> dict[str, Any]:
    """Returns what was left after sudden deaths."""
    broken: list[str] = []
    hidden = folders = videos = 0
    not_removed: list[str] = []
    for _ in range(number):
        before = set(job_folders(folder))
        worker = Process(folder, samples)
        worker.ready()
        not_removed += sorted(before & set(worker.left()))
        stop = threading.Event()
        client = threading.Thread(target=_keep_asking, args=(worker, samples, stop), daemon=True)
        client.start()
        time.sleep(chance.uniform(0.05, 8.0))
        stop.set()
        worker.end(signal.SIGKILL)
        client.join()
        folders += bool(worker.left())
        for path in worker.volume.rglob("*"):
            if path.is_file() and path.name.startswith("."):
                hidden += 1
            elif path.is_file():
                videos += 1
                if not _whole(path):
                    broken.append(path.name)
    return {
        "kills": number,
        "partial_files": len(broken),
        "whole_videos_seen": videos,
        "hidden_files_seen": hidden,
        "kills_that_left_a_folder": folders,
        "folders_not_removed_by_the_next_start": not_removed,
    }


def job_folders(folder: Path) -> list[str]:
    """Returns the names in the folder of the jobs before a start."""
    return sorted(path.name for path in (folder / "tmp").glob("xicon-job-*"))


def _keep_asking(worker: Process, samples: Samples, stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        number += 1
        try:
            worker.ask(samples.good(number) | {"output": {"return": "volume"}})
        except (OSError, ValueError):  # killed in the middle of an answer
            return


def _whole(path: Path) -> bool:
    try:
        return probe(path).num_frames in (5, 9)
    except XiconError:
        return False


def fuzz(number: int, chance: random.Random) -> dict[str, Any]:
    """Returns how many random requests were refused, accepted, and not handled."""
    settings = read_settings({"XICON_PRESET": "tiny"})
    context = RequestContext(modes=settings.modes, loras=("a.safetensors",))
    counts: Counter[str] = Counter()
    unhandled: list[str] = []
    for _ in range(number):
        event = nonsense(chance)
        try:
            counts[_accepted(event, settings, context)] += 1
        except Exception as error:  # noqa: BLE001 - this is what is counted
            unhandled.append(f"{type(error).__name__}: {error} <- {event!r}"[:600])
    return {
        "requests": number,
        **counts,
        "unhandled": len(unhandled),
        "examples": unhandled[:5],
    }


def _accepted(event: dict[str, Any], settings: Any, context: RequestContext) -> str:
    try:
        request = parse_request(event, settings, context)
    except InvalidRequest:
        return "refused"
    if request.action or request.dry_run:
        return "answered"
    files = {role: Path(f"{role}.mp4") for role in request.media}
    values = to_job_values(request, files, Path("out.mp4"))
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
    try:
        make_job(plain, source="request")
    except XiconError:
        return "refused_later"
    return "accepted"


def main(argv: list[str] | None = None) -> int:
    """Prints the figures, and writes them if asked; returns 1 if one is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for everything that is made")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--fuzz", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    words = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(words)
    given.folder.mkdir(parents=True, exist_ok=True)
    samples = Samples(given.folder)
    chance = random.Random(given.seed)
    start = time.monotonic()
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.reliability", *words]),
        "commit": commit(),
        "machine": processor(),
        "versions": {name: version(name) for name in ("runpod", "torch", "av", "numpy")}
        | {"python": sys.version.split()[0]},
    }
    for name, work in (
        ("fuzz", lambda: fuzz(given.fuzz, chance)),
        ("soak", lambda: soak(_fresh(given.folder, "soak"), samples, given.jobs, chance)),
        ("kills", lambda: kills(_fresh(given.folder, "kills"), samples, given.kills, chance)),
    ):
        figures[name] = work()
        print(json.dumps({name: figures[name]}, indent=1), flush=True)
    figures["seconds"] = round(time.monotonic() - start, 1)
    if given.out:
        given.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if _good(figures) else 1


def _fresh(folder: Path, name: str) -> Path:
    made = folder / f"{name}-{os.getpid()}"
    made.mkdir()
    return made


def _good(figures: dict[str, Any]) -> bool:
    lost, killed = figures["soak"], figures["kills"]
    return not (
        figures["fuzz"]["unhandled"]
        or lost["lost_or_wrong"]
        or lost["folders_left"]
        or not lost["order_kept"]
        or killed["partial_files"]
        or killed["folders_not_removed_by_the_next_start"]
    )


if __name__ == "__main__":
    sys.exit(main())
