"""How long is it from the start of a process to the moment at which it can take a job?

Writes a transformer as a prepared fp8 file has it (random weights), then starts processes that
import, open the device, read it, assemble it and run two forward passes, each told apart:

- first-ever: file out of the page cache, no compiled kernels kept from before;
- kernels-kept: the same, with the caches of Triton and Inductor that the first one filled;
- early-reading: besides, the file is read into the page cache while Python imports;
- file-in-memory: besides, the file is in the page cache already.

"Out of the page cache" is what posix_fadvise gives; under a virtual machine the host may still
have it. With fewer blocks than 40 the result also says what whole weights would take at the rates
that were measured. --worker times the real worker with the tiny preset until it says it is ready.
Writes one JSON file.

    python -m benchmarks.cold_start --device cuda --layers 40
    python -m benchmarks.cold_start --tiny --worker
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.cold_start_child import MARK
from benchmarks.job_models import on_meta, transformer_state
from benchmarks.load import MIB, share_in_cache
from benchmarks.machine import RESULTS, ROOT, environment, write
from pipelines import tiny
from pipelines.loading import LoadOptions
from xicon_infer.models.scail import SCAIL_14B, ScailTransformer

WHOLE_BYTES = 24e9
"""Everything that a prepared SCAIL reads at a start (performance.md, 4.1)."""
WHOLE_LAYERS = 40
GRID, TINY_GRID = (21, 84, 52), (2, 8, 8)
"""Latent frames, rows and columns of 416x672x81, and of a test."""

CASES = {
    "first-ever": {"cold": True, "kept": False, "early": False},
    "kernels-kept": {"cold": True, "kept": True, "early": False},
    "early-reading": {"cold": True, "kept": True, "early": True},
    "file-in-memory": {"cold": False, "kept": True, "early": True},
}
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XICON_CACHE_DIR")


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    if args.device == "cpu":
        torch.set_num_threads(1)
    report = environment("benchmarks.cold_start", args.device) | {"left_out": [], "starts": {}}
    path = args.out / f"cold_start_{args.device}{'_tiny' if args.tiny else ''}.json"
    with TemporaryDirectory(dir=args.folder) as folder:
        file = write_weights(Path(folder) / "prepared.safetensors", args)
        report |= {"file_bytes": file.stat().st_size, "layers": layers_of(args)}
        for name in args.cases:
            try:
                start = start_case(name, args, file, Path(folder))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                report["left_out"].append(f"{name}: {str(error)[:300]}")
            else:
                report["starts"][name] = start | {"whole": scaled(start, report, args)}
            write(report, path)
    if args.worker:
        report["worker"] = worker_start(args, report["left_out"])
    write(report, path)
    for name, start in report["starts"].items():
        print(f"{name:<16} {start['ready_s']:7.2f} s ready")
    print(f"written to {path}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--layers", type=int, help="blocks of the file; 40 are the whole model")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--matmul", default="auto", help="how fp8 weights multiply")
    parser.add_argument("--worker", action="store_true", help="also time the tiny worker")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one start")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's if unset")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("the published sizes need --device cuda; on a CPU run --tiny")
    return args


def layers_of(args: argparse.Namespace) -> int:
    """Returns the number of blocks in the file."""
    return args.layers or (tiny.TINY_SCAIL.num_layers if args.tiny else WHOLE_LAYERS)


def write_weights(path: Path, args: argparse.Namespace) -> Path:
    """Writes a transformer with random fp8 blocks, through to the disk; returns its path."""
    config = replace(tiny.TINY_SCAIL if args.tiny else SCAIL_14B, num_layers=layers_of(args))
    device = torch.device(args.device)
    options = LoadOptions(device=device, dtype=torch.bfloat16)
    state = transformer_state(on_meta(lambda: ScailTransformer(config)), options, fp8=True)
    save_file({name: value.cpu() for name, value in state.items()}, path)
    del state
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the processes to be timed need the card
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path


def start_case(name: str, args: argparse.Namespace, file: Path, folder: Path) -> dict[str, Any]:
    """Returns what the process of a case told, and how much of the file was in memory before."""
    case = CASES[name]
    caches = folder / "kept"
    if not case["kept"]:
        rmtree(caches, ignore_errors=True)
    caches.mkdir(exist_ok=True)
    set_page_cache(file, cold=case["cold"])
    share = share_in_cache(file)
    start = start_once(args, file, caches, early=case["early"])
    return {"share_in_page_cache_before": round(share, 3), **start}


def start_once(
    args: argparse.Namespace, file: Path, caches: Path, *, early: bool
) -> dict[str, Any]:
    """Returns the steps of one start, in seconds from step to step, and when it was ready.

    Raises:
        RuntimeError: it ended without an answer; says what it printed last.
    """
    told = {
        "path": str(file), "device": args.device, "early": early, "matmul": args.matmul,
        "grid": TINY_GRID if args.tiny else GRID, "began": time.time(),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cold_start_child", json.dumps(told)],
        cwd=ROOT,
        env={**os.environ, **{name: str(caches / name.lower()) for name in CACHES}},
        capture_output=True,
        text=True,
        check=False,
        timeout=args.limit,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"a start failed: {words[-1] if words else done.returncode}")
    found = json.loads(lines[0].removeprefix(MARK))
    return figures(found["steps"]) | {"facts": found["facts"]}


def figures(done: dict[str, float]) -> dict[str, Any]:
    """Returns seconds of each step from the moments at which they were done.

    Ready is the end of the first forward pass: its kernels are there then.
    """
    moments = [0.0, *done.values()]
    steps = {
        name: round(moment - before, 4)
        for (name, moment), before in zip(done.items(), moments, strict=False)
    }
    return {"ready_s": round(done["first forward"], 4), "steps_s": steps}


def scaled(
    start: dict[str, Any], report: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any] | None:
    """Returns what all 24 GB and all blocks would take at the measured rates; None at tiny size.

    Reading counts by bytes, assembling and the forward pass by blocks, the rest as it is.
    """
    if args.tiny:
        return None
    by_bytes, by_layers = WHOLE_BYTES / report["file_bytes"], WHOLE_LAYERS / report["layers"]
    factors = {"read weights": by_bytes, "assemble": by_layers, "first forward": by_layers}
    steps = start["steps_s"]
    ready = sum(
        seconds * factors.get(name, 1.0)
        for name, seconds in steps.items()
        if name != "second forward"
    )
    rate = report["file_bytes"] / steps["read weights"] / 1e9
    return {
        "ready_s": round(ready, 3),
        "read_gb_per_s": round(rate, 3),
        "says": f"{WHOLE_BYTES / 1e9:g} GB and {WHOLE_LAYERS} blocks, computed from "
        f"{report['file_bytes'] / 1e9:.1f} GB and {report['layers']} blocks",
    }


def set_page_cache(path: Path, *, cold: bool) -> None:
    """Brings the file out of the page cache, or into it."""
    descriptor = os.open(path, os.O_RDONLY)
    if cold:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        scratch = memoryview(bytearray(16 * MIB))
        for start in range(0, path.stat().st_size, len(scratch)):
            os.preadv(descriptor, [scratch], start)
    os.close(descriptor)


def worker_start(args: argparse.Namespace, left_out: list[str]) -> dict[str, Any] | None:
    """Returns the steps of the real worker with the tiny preset until it says it is ready."""
    if find_spec("runpod") is None:
        left_out.append("worker: the package runpod is not installed")
        return None
    with TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        env = os.environ | {"XICON_PRESET": "tiny", "XICON_MODES": "scail", "XICON_TMP": folder}
        words = ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", port]
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "handler.py"), *words],
            cwd=folder,
            env=env | {"NETWORK_VOLUME_PATH": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        timer = Timer(args.limit, process.kill)
        timer.start()
        try:
            return until_ready(process, began, left_out)
        finally:
            timer.cancel()
            process.kill()
            process.wait()


def until_ready(
    process: subprocess.Popen[str], began: float, left_out: list[str]
) -> dict[str, Any] | None:
    """Returns the steps that a worker logs, and the seconds until it is ready; None if it fails."""
    steps: dict[str, float] = {}
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        last = line.strip() or last
        if not line.startswith('{"ts"'):
            continue
        told = json.loads(line)
        if told["event"] == "start.step":
            steps[told["step"]] = told["seconds"]
        if told["event"] == "ready":
            return {"ready_s": round(time.time() - began, 3), "steps_s": steps}
    left_out.append(f"worker: it did not become ready: {last[:300]}")
    return None


if __name__ == "__main__":
    main()
