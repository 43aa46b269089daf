"""Times our video VAE against diffusers' AutoencoderKLWan, decode and encode.

Random weights, the same in both. Candidates run in turns (A B C A B C ...), so that a machine that
slows down slows all of them down; the first call of each is reported apart. The clock is wall time
on CUDA and processor time of this process on the CPU, where other programs may run beside it.
Writes one JSON file.

    python -m benchmarks.vae --device cpu --height 64 --width 64 --frames 9
    python -m benchmarks.vae --device cuda --dtype bfloat16 --height 480 --width 832 --frames 81
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_layers import Upsample, fold_doubling, layer

ROOT = Path(__file__).resolve().parents[1]
# FLOP per pixel of the first frame and of each later one, as the reference computes them.
CLOSED_FORM = {"decode": (10.8e6, 8.47e6), "encode": (6.8e6, 5.03e6)}


@dataclass(frozen=True)
class Candidate:
    """One way to run a task, by name."""

    name: str
    run: Callable[[], Tensor]


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    theirs, fast, plain = build_models(args)
    report: dict[str, Any] = describe(args)
    for task in ("decode", "encode"):
        report[task] = measure(task, candidates(task, (theirs, fast, plain), args), args)
    report["doubling"] = measure_doubling(fast, args)
    name = f"vae_{args.device}_{args.width}x{args.height}x{args.frames}_{args.dtype}.json"
    path = args.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"written to {path}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--height", type=int, default=64, help="pixels, a multiple of 8")
    parser.add_argument("--width", type=int, default=64, help="pixels, a multiple of 8")
    parser.add_argument("--frames", type=int, default=9, help="4n + 1")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2], help="latents at a time")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each candidate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN search kernels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def build_models(args: argparse.Namespace) -> tuple[Any, WanVAE, WanVAE]:
    """Returns diffusers' VAE, ours in the fast order, and ours in the reference's order."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    torch.manual_seed(args.seed)
    theirs = AutoencoderKLWan()
    weights = theirs.state_dict()
    with torch.device("meta"):
        fast, plain = WanVAE(fast=True), WanVAE(fast=False)
    # diffusers renames our keys; numbers in place of the tensors tell which became which.
    ours = list(fast.state_dict())
    renamed = convert_wan_vae_to_diffusers({name: torch.tensor(i) for i, name in enumerate(ours)})
    state = {ours[int(i)]: weights[name] for name, i in renamed.items()}
    models = []
    for vae in (fast, plain):
        vae.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
        models.append(vae.to(args.device, getattr(torch, args.dtype)).eval())
    theirs = theirs.to(args.device, getattr(torch, args.dtype)).eval()
    return theirs, models[0].to_channels_last(), models[1]


def candidates(
    task: str, models: tuple[Any, WanVAE, WanVAE], args: argparse.Namespace
) -> list[Candidate]:
    """Returns the ways to run a task; the first is the baseline."""
    theirs, fast, plain = models
    generator = torch.Generator().manual_seed(args.seed)
    latent_frames = (args.frames - 1) // 4 + 1
    shapes = {
        "encode": (1, 3, args.frames, args.height, args.width),
        "decode": (1, 16, latent_frames, args.height // 8, args.width // 8),
    }
    x = torch.randn(shapes[task], generator=generator)
    x = (x.clamp(-1, 1) if task == "encode" else x).to(args.device, getattr(torch, args.dtype))

    def baseline() -> Tensor:
        if task == "encode":
            return theirs.encode(x).latent_dist.mean
        return theirs.decode(x).sample

    def our(vae: WanVAE, chunk: int) -> Callable[[], Tensor]:
        if task == "encode":
            return lambda: vae.encode(x, chunk=chunk)
        # diffusers clamps too.
        return lambda: vae.decode(x, chunk=chunk).clamp_(-1, 1)

    return [
        Candidate("diffusers", baseline),
        Candidate("ours, reference order", our(plain, 1)),
        *(Candidate(f"ours, fast, chunk {chunk}", our(fast, chunk)) for chunk in args.chunks),
    ]


def measure(task: str, found: list[Candidate], args: argparse.Namespace) -> dict[str, Any]:
    """Returns seconds, peak memory and difference to the baseline of each candidate."""
    first, later = CLOSED_FORM[task]
    flop = args.width * args.height * (first + later * (args.frames - 1))
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in found}
    results: dict[str, dict[str, Any]] = {}
    reference = torch.empty(0)
    for candidate in found:
        before = reset_peak(args.device)
        elapsed, value = timed(candidate, args.device)
        working = peak_bytes(args.device) - before
        if candidate is found[0]:
            reference = value
        difference = (value.double() - reference.double()).abs().max().item()
        results[candidate.name] = {
            "first_call_s": round(elapsed, 4),
            "peak_bytes_above_start": working,
            "max_abs_difference": difference,
        }
        del value
    for _ in range(args.rounds):
        for candidate in found:
            seconds[candidate.name].append(timed(candidate, args.device)[0])
    baseline = statistics.median(seconds[found[0].name])
    for name, values in seconds.items():
        median = statistics.median(values)
        results[name] |= {
            "median_s": round(median, 4),
            "min_s": round(min(values), 4),
            "max_s": round(max(values), 4),
            "speed_up": round(baseline / median, 3),
            # Work of the reference per second: what a fast order leaves out counts as done.
            "tflop_per_s": round(flop / median / 1e12, 4),
        }
    return results


def measure_doubling(vae: WanVAE, args: argparse.Namespace) -> dict[str, Any]:
    """Returns median seconds of each doubling of a picture, folded and step by step.

    The one choice of the fast order that another kernel could turn around: a transposed
    convolution in place of repeated pixels and a convolution.
    """
    found = {}
    layers = [block for block in vae.decoder.upsamples if isinstance(block, Upsample)]
    for level, block in enumerate(layers):
        conv = layer(block.resample, 1, torch.nn.Conv2d)
        # Frames that one latent frame makes at this level, after the doubling in time.
        frames = min(4, 2 ** (level + 1))
        size = (args.height >> 3 - level, args.width >> 3 - level)
        x = torch.randn(frames, conv.in_channels, *size).to(conv.weight)
        x = x.to(memory_format=torch.channels_last)
        ways = (
            Candidate("folded", lambda x=x, conv=conv: doubled(x, conv, True)),
            Candidate("step by step", lambda x=x, conv=conv: doubled(x, conv, False)),
        )
        seconds = [[timed(way, args.device)[0] for way in ways] for _ in range(args.rounds + 1)]
        for way, values in zip(ways, zip(*seconds[1:], strict=True), strict=True):
            found[f"{list(x.shape)} {way.name}"] = round(statistics.median(values), 6)
    return found


def doubled(x: Tensor, conv: torch.nn.Conv2d, fold: bool) -> Tensor:
    """Returns conv(x repeated 2 x 2), [N, C/2, 2H, 2W], in either way."""
    if fold:
        return F.conv_transpose2d(x, fold_doubling(conv.weight), conv.bias, 2, 1)
    out: Tensor = conv(F.interpolate(x, scale_factor=2, mode="nearest-exact"))
    return out


@torch.inference_mode()
def timed(candidate: Candidate, device: str) -> tuple[float, Tensor]:
    """Returns the seconds that a call takes, and its result."""
    synchronize(device)
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    start = clock()
    value = candidate.run()
    synchronize(device)
    return clock() - start, value


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reset_peak(device: str) -> int:
    """Forgets the peak memory so far; returns the bytes in use."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    # Memory that an earlier call freed would hide what this one takes: give it back first.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # 5 resets the high-water mark of the resident set (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """Returns the peak since `reset_peak`: of tensors on CUDA, of the whole process on the CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return resident_bytes("VmHWM")


def resident_bytes(field: str) -> int:
    """Returns a field of this process's memory, Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what is needed to repeat the run: command, machine, versions, commit."""
    import diffusers

    cuda = args.device.startswith("cuda")
    cpu = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip()
        for line in (cpu.read_text().splitlines() if cpu.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "command": shlex.join(["python", "-m", "benchmarks.vae", *sys.argv[1:]]),
        "shape": {"height": args.height, "width": args.width, "frames": args.frames},
        "dtype": args.dtype,
        "rounds": args.rounds,
        "clock": "wall" if cuda else "process",
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "cpu": models[0] if models else platform.processor(),
            "threads": args.threads,
            "load_average": Path("/proc/loadavg").read_text().split()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
        },
        "commit": git("rev-parse", "HEAD") or "none",
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }


def git(*arguments: str) -> str:
    """Returns what git prints, or nothing if it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
