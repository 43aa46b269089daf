"""Times our loader against safetensors' own and against plain reads of the same file.

Writes a synthetic fp8 file: names and sizes of Wan2.1-14B blocks, random bytes. The candidates run
in turns in one process, in a new order each turn, with the file out of the page cache ("cold") and
in it ("warm"). Before each, memory of the size of the file is taken, used and given back: a virtual
machine gets memory from its host when it first uses it, and that is not to be timed. The first turn
is thrown away. Each candidate has a time until the tensors are there and a time until one byte of
every page of them was read, because mapped tensors may still be on the disk. Rates are bytes of the
file per second. Under a virtual machine "cold" is cold for its kernel alone.

Three plain reads, with no parsing, stand for what the machine can do:

- read, thrown away: each thread fills one small buffer again and again. No loader that copies
  can be as fast on a warm file, because this one has nowhere to put the data.
- read, kept: into fresh memory of the size of the file, in huge pages.
- read, kept, small pages: the same in memory as `malloc` gives it.

Writes one JSON file.

    python -m benchmarks.load
    python -m benchmarks.load --gigabytes 16 --device cuda
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.vae import git
from xicon_infer.weights.checkpoint import open_checkpoint
from xicon_infer.weights.reader import Host, stream_tensors
from xicon_infer.weights.reader_extents import extent_bytes
from xicon_infer.weights.reader_memory import host_slab
from xicon_infer.weights.reader_threads import read_fully, share_out

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
DIM, FFN = 5120, 13824
RAW = "read, thrown away"
KEPT = "read, kept"
SMALL = "read, kept, small pages"
LOADED, READY = "loaded_gb_per_s", "every_page_read_gb_per_s"


@dataclass(frozen=True)
class Candidate:
    """One way to load the file, or to read it: plain."""

    name: str
    run: Callable[[], dict[str, Tensor]]
    plain: bool = False


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    torch.set_num_threads(1)
    with TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "wan_fp8.safetensors"
        write_file(path, int(args.gigabytes * 1e9), args.seed)
        found = candidates(path, args)
        report = describe(args, path)
        report["equal"] = check_equal(found, path)
        for state in ("cold", "warm"):
            report[state] = measure(state, found, path, args)
    report["machine"]["load_average_after"] = os.getloadavg()[0]
    report["ratios"] = ratios(report)
    target = args.out / f"load_{args.device}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"written to {target}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file, at least 1")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each candidate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's if unset")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def wan_tensors(num_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns name -> dtype and shape: whole blocks of an fp8 Wan2.1-I2V-14B file, about so many.

    In the order that safetensors writes: wide dtypes first, then by name.
    """
    weights: dict[str, tuple[int, ...]] = {
        f"{kind}.{part}": (DIM, DIM)
        for kind, parts in (
            ("self_attn", ("q", "k", "v", "o")),
            ("cross_attn", ("q", "k", "v", "o", "k_img", "v_img")),
        )
        for part in parts
    }
    weights |= {"ffn.0": (FFN, DIM), "ffn.2": (DIM, FFN)}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    block = sum(prod(shape) for shape in weights.values())
    for number in range(max(1, round(num_bytes / block))):
        start = f"blocks.{number}"
        for name, shape in weights.items():
            tensors[f"{start}.{name}.weight"] = ("F8_E4M3", shape)
            tensors[f"{start}.{name}.bias"] = ("BF16", shape[:1])
            tensors[f"{start}.{name}.scale_weight"] = ("F32", (1,))
        for name in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "norm3"):
            tensors[f"{start}.{name}.weight"] = ("F32", (DIM,))
        tensors[f"{start}.modulation"] = ("F32", (1, 6, DIM))
    order = ("F32", "BF16", "F8_E4M3")
    return dict(sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])))


def write_file(path: Path, num_bytes: int, seed: int) -> None:
    """Writes the file tensor by tensor, and to the disk, so that it can leave the page cache."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in wan_tensors(num_bytes).items():
        size = prod(shape) * {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
        offsets = [position, position + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, position, 64 * MIB):
            file.write(rng.bytes(min(64 * MIB, position - start)))
        file.flush()
        os.fsync(file.fileno())


def candidates(path: Path, args: argparse.Namespace) -> list[Candidate]:
    """Returns the ways to load the file."""
    device = torch.device(args.device)
    found = []
    for threads in args.threads:
        found += [
            Candidate(f"{name}, {threads} threads", plain_read(path, name, threads), plain=True)
            for name in (RAW, KEPT, SMALL)
        ]
        hosts: tuple[Host, ...] = ("mapped", "copied") if device.type == "cpu" else ("mapped",)
        found += [
            Candidate(
                f"ours, {host if device.type == 'cpu' else device.type}, {threads} threads",
                ours(path, device, threads, host),
            )
            for host in hosts
        ]
    found += [
        Candidate("safetensors load_file", lambda: load_file(path)),
        Candidate("safetensors safe_open", lambda: open_safely(path)),
    ]
    if device.type == "cuda":
        found += [
            Candidate("safetensors load_file, cuda", lambda: load_file(path, device="cuda")),
            Candidate("safetensors load_file, pinned, then cuda", lambda: through_pinned(path)),
        ]
    return found


def plain_read(path: Path, kind: str, threads: int) -> Callable[[], dict[str, Tensor]]:
    """Returns a function that reads the file in threads and parses nothing."""
    size = path.stat().st_size
    step = extent_bytes(size, threads, 16 * MIB)

    def run() -> dict[str, Tensor]:
        fd = os.open(path, os.O_RDONLY)
        if kind == RAW:
            scratch = [memoryview(bytearray(step)) for _ in range(threads)]
            free = list(range(threads))
        elif kind == KEPT:
            kept = memoryview(host_slab(size))
        else:
            kept = memoryview(mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS))

        def work(start: int) -> int:
            length = min(step, size - start)
            if kind != RAW:
                read_fully(fd, [kept[start : start + length]], start)
                return length
            own = free.pop()
            read_fully(fd, [scratch[own][:length]], start)
            free.append(own)
            return length

        share_out(range(0, size, step), work, threads=threads, after=lambda _: None)
        os.close(fd)
        return {}

    return run


def ours(
    path: Path, device: torch.device, threads: int, host: Host
) -> Callable[[], dict[str, Tensor]]:
    """Returns a function that opens and loads the file with our loader."""
    return lambda: stream_tensors(open_checkpoint(path), device=device, threads=threads, host=host)


def open_safely(path: Path) -> dict[str, Tensor]:
    """Returns the tensors that `safe_open` gives one by one."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def through_pinned(path: Path) -> dict[str, Tensor]:
    """Returns the tensors on the GPU by way of pinned copies, one after the other."""
    tensors = {
        name: tensor.pin_memory().to("cuda", non_blocking=True)
        for name, tensor in load_file(path).items()
    }
    torch.cuda.synchronize()
    return tensors


def check_equal(found: list[Candidate], path: Path) -> dict[str, bool]:
    """Returns whether each loader gives the very bytes that safetensors gives."""
    expected = load_file(path)
    return {
        candidate.name: same(candidate.run(), expected)
        for candidate in found
        if not candidate.plain
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Returns whether two files are the same: names, dtypes, shapes and bytes."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(flat_bytes(found[name]).cpu(), flat_bytes(tensor))
        for name, tensor in expected.items()
    )


def flat_bytes(tensor: Tensor) -> Tensor:
    """Returns the bytes of a tensor, uint8 [n]."""
    return tensor.reshape(-1).view(torch.uint8)


def measure(
    state: str, found: list[Candidate], path: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Returns the rates of every candidate with the file cold or warm."""
    loaded: dict[str, list[float]] = {candidate.name: [] for candidate in found}
    ready: dict[str, list[float]] = {candidate.name: [] for candidate in found}
    cached: list[float] = []
    order = random.Random(args.seed)
    for turn in range(args.rounds + 1):
        for candidate in order.sample(found, len(found)):
            prepare(path, state)
            cached.append(share_in_cache(path))
            first, second = timed(candidate)
            if turn:
                loaded[candidate.name].append(first)
                ready[candidate.name].append(second)
    size = path.stat().st_size
    return {
        "share_in_page_cache_before": [round(min(cached), 3), round(max(cached), 3)],
        **{
            name: {LOADED: rates(loaded[name], size), READY: rates(ready[name], size)}
            for name in loaded
        },
    }


def rates(seconds: list[float], size: int) -> dict[str, float]:
    """Returns the median, least and greatest rate in GB/s."""
    values = [size / value / 1e9 for value in seconds]
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def prepare(path: Path, state: str) -> None:
    """Has the machine own memory for the file; brings the file out of the page cache or into it."""
    gc.collect()
    size = path.stat().st_size
    np.frombuffer(host_slab(size), np.uint8)[::4096] = 1
    fd = os.open(path, os.O_RDONLY)
    if state == "cold":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        scratch = memoryview(bytearray(MIB))
        for start in range(0, size, MIB):
            os.preadv(fd, [scratch], start)
    os.close(fd)


def share_in_cache(path: Path, samples: int = 64) -> float:
    """Returns the part of the file that can be read without waiting for the disk."""
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    hits = 0
    for number in range(samples):
        with suppress(BlockingIOError):  # RWF_NOWAIT reads nothing from the disk
            hits += os.preadv(fd, [bytearray(1)], size // samples * number, os.RWF_NOWAIT)
    os.close(fd)
    return hits / samples


def timed(candidate: Candidate) -> tuple[float, float]:
    """Returns the seconds until the tensors are there, and until every page of them was read."""
    start = time.perf_counter()
    tensors = candidate.run()
    loaded = time.perf_counter() - start
    total = 0
    for tensor in tensors.values():
        if not tensor.is_cuda:
            total += int(flat_bytes(tensor)[::4096].numpy().sum())
    return loaded, time.perf_counter() - start


def ratios(report: dict[str, Any]) -> dict[str, Any]:
    """Returns our median rates, every page read, by those of the plain reads with as many threads.

    And by the fastest plain read of all, with any number of threads.
    """
    out: dict[str, Any] = {}
    for state in ("cold", "warm"):
        plain = {
            name: found[LOADED]["median"]
            for name, found in report[state].items()
            if name.startswith(RAW.split(",")[0])
        }
        for name, found in report[state].items():
            if name.startswith("ours"):
                threads = name.rsplit(", ", 1)[1]
                rate = found[READY]["median"]
                out.setdefault(state, {})[name] = {
                    **{k: round(rate / plain[f"{k}, {threads}"], 3) for k in (RAW, KEPT)},
                    "fastest plain read": round(rate / max(plain.values()), 3),
                }
    return out


def describe(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Returns what is needed to repeat the run: command, machine, versions, commit."""
    cuda = args.device.startswith("cuda")
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "command": shlex.join(["python", "-m", "benchmarks.load", *sys.argv[1:]]),
        "file": {"bytes": path.stat().st_size, "tensors": len(open_checkpoint(path).shapes)},
        "rounds": args.rounds,
        "clock": "wall",
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "cpu": names[0] if names else platform.processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "kernel": platform.release(),
            "load_average_before": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "cuda": torch.version.cuda if cuda else None,
        },
        "commit": git("rev-parse", "HEAD") or "none",
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }


if __name__ == "__main__":
    main()
