"""Times our video VAE against diffusers' AutoencoderKLWan, decode and encode.

Random weights, the same in both. Candidates run in turns (A B C A B C ...), so that a machine that
slows down slows all of them down; the first call of each is reported apart. The clock is wall time
on CUDA and processor time of this process on the CPU, where other programs may run beside it.
Beside the whole, each saving is switched off alone ("without ..."), which gives its gain. Writes
one JSON file per size.

    python -m benchmarks.vae --device cpu --height 64 --width 64 --frames 9
    python -m benchmarks.vae --device cpu --dim 24 --height 224 --width 128 --frames 17
    python -m benchmarks.vae --device cuda --dtype bfloat16 --sizes 832x480x81 672x416x81
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from xicon_infer import formulas_vae
from xicon_infer.models import vae_layers
from xicon_infer.models.vae import Kernels, VAEConfig, WanVAE
from xicon_infer.models.vae_layers import Upsample, fold_doubling, layer

ROOT = Path(__file__).resolve().parents[1]
FLOPS = {"decode": formulas_vae.decode_flops, "encode": formulas_vae.encode_flops}
"""Work as the reference does it, counted over its layers."""


class Models(NamedTuple):
    """The same weights four times.

    theirs: diffusers' VAE. fast: ours, weights with channels last in memory. unordered: ours,
    weights as in the file. plain: ours, in the reference's order of computation.
    """

    theirs: Any
    fast: WanVAE
    unordered: WanVAE
    plain: WanVAE


FAST = "ours, fast, chunk "
WITHOUT = "ours, without "


@dataclass(frozen=True)
class Candidate:
    """One way to run a task, by name."""

    name: str
    run: Callable[[], Tensor]


def main(words: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse(words)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    models = build_models(args)
    for size in args.sizes or [(args.width, args.height, args.frames)]:
        args.width, args.height, args.frames = size
        print(f"written to {run_size(models, args)}")


def run_size(models: Models, args: argparse.Namespace) -> Path:
    """Measures both directions at one size; writes and prints the result, returns its file.

    The file is written anew after each direction: a run cut short leaves what it has.
    """
    report: dict[str, Any] = describe(args)
    report["kernels"] = models.fast.why_not_fused() or "triton"
    narrow = "" if args.dim == VAEConfig().dim else f"_dim{args.dim}"
    size = f"{args.width}x{args.height}x{args.frames}"
    name = f"vae_{args.device}{narrow}_{size}_{args.dtype}.json"
    path: Path = args.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    report["switches"] = {}
    for task in ("decode", "encode"):
        report[task] = measure(task, candidates(task, models, args), args)
        report["switches"][task] = switches(report[task])
        path.write_text(json.dumps(report, indent=1) + "\n")
    report["doubling"] = measure_doubling(models.fast, args)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return path


def size_of(text: str) -> tuple[int, int, int]:
    """Returns (width, height, frames) of "832x480x81"."""
    width, height, frames = map(int, text.split("x"))
    return width, height, frames


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument(
        "--dim",
        type=int,
        default=VAEConfig().dim,
        help="width of the first level; tiny: 24",
    )
    parser.add_argument("--height", type=int, default=64, help="pixels, a multiple of 8")
    parser.add_argument("--width", type=int, default=64, help="pixels, a multiple of 8")
    parser.add_argument("--frames", type=int, default=9, help="4n + 1")
    parser.add_argument("--sizes", type=size_of, nargs="+", help="WIDTHxHEIGHTxFRAMES, several")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2], help="latents at a time")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each candidate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN search kernels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(words)


def build_models(args: argparse.Namespace) -> Models:
    """Returns diffusers' VAE and ours, with the same random weights."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    torch.manual_seed(args.seed)
    theirs, config = AutoencoderKLWan(base_dim=args.dim), VAEConfig(dim=args.dim)
    weights = theirs.state_dict()
    with torch.device("meta"):
        fast, unordered, plain = (WanVAE(config, fast=fast) for fast in (True, True, False))
    # diffusers renames our keys; numbers in place of the tensors tell which became which.
    ours = list(fast.state_dict())
    renamed = convert_wan_vae_to_diffusers({name: torch.tensor(i) for i, name in enumerate(ours)})
    state = {ours[int(i)]: weights[name] for name, i in renamed.items()}
    models = []
    for vae in (fast, unordered, plain):
        vae.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
        models.append(vae.to(args.device, getattr(torch, args.dtype)).eval())
    theirs = theirs.to(args.device, getattr(torch, args.dtype)).eval()
    return Models(theirs, models[0].to_channels_last(), models[1], models[2])


def candidates(task: str, models: Models, args: argparse.Namespace) -> list[Candidate]:
    """Returns the ways to run a task; the first is the baseline, the last ones lack one saving.

    "without" is always compared with the longest chunk.
    """
    theirs, fast, unordered, plain = models
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

    def our(vae: WanVAE, chunk: int, kernels: Kernels = "auto") -> Callable[[], Tensor]:
        def run() -> Tensor:
            vae.kernels = kernels
            try:
                if task == "encode":
                    return vae.encode(x, chunk=chunk)
                # diffusers clamps too.
                return vae.decode(x, chunk=chunk).clamp_(-1, 1)
            finally:
                vae.kernels = "auto"

        return run

    longest = max(args.chunks)
    found = [
        Candidate("diffusers", baseline),
        Candidate("ours, reference order", our(plain, 1)),
        *(Candidate(f"{FAST}{chunk}", our(fast, chunk)) for chunk in sorted(args.chunks)),
        Candidate(f"{WITHOUT}channels last weights", our(unordered, longest)),
    ]
    if args.device == "cpu":
        found.append(Candidate(f"{WITHOUT}oneDNN by name", without_onednn(our(fast, longest))))
    if not fast.why_not_fused():
        found.append(Candidate(f"{WITHOUT}fused kernels", our(fast, longest, "eager")))
    return found


def without_onednn(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns the call with the convolutions that torch chooses by itself."""

    def plain() -> Tensor:
        with mock.patch.object(vae_layers, "has_onednn", lambda: False):
            return run()

    return plain


def switches(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns what each saving gains alone: seconds without it, with it, and their ratio."""
    chunks = {name: found for name, found in results.items() if name.startswith(FAST)}
    shortest, *_, longest = [*chunks.values()] * 2 if len(chunks) == 1 else chunks.values()
    pairs = {
        name.removeprefix(WITHOUT): (found["median_s"], longest["median_s"])
        for name, found in results.items()
        if name.startswith(WITHOUT)
    }
    pairs["longer pieces"] = (shortest["median_s"], longest["median_s"])
    return {
        name: {"without_s": off, "with_s": on, "gain": round(off / on, 3)}
        for name, (off, on) in pairs.items()
    }


def measure(task: str, found: list[Candidate], args: argparse.Namespace) -> dict[str, Any]:
    """Returns seconds, peak memory and difference to the baseline of each candidate."""
    flop = FLOPS[task](args.width, args.height, args.frames, formulas_vae.VaeShape(args.dim))
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
        if task == "decode":
            levels = (to_bytes(value) - to_bytes(reference)).abs()
            results[candidate.name] |= {
                "max_difference_levels": levels.max().item(),
                "mean_difference_levels": round(levels.float().mean().item(), 5),
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


def to_bytes(video: Tensor) -> Tensor:
    """Returns a video as it is written, in 256 levels, int16 so that it can be subtracted."""
    return video.float().clamp(-1, 1).add(1).mul(127.5).add(0.5).to(torch.int16)


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
