"""Times a linear layer by how its weight is stored and multiplied, at the shapes of Wan2.1 14B.

Candidates: weight held in the compute dtype (baseline), fp8 dequantised at every call, and fp8
products with a scale per row or per tensor where the device can. Random normal weights and inputs;
the error is relative L2 against float32 with the weight before rounding. Candidates run in turns.
The clock is wall time on CUDA and processor time of this process on the CPU. Writes one JSON file.

    python -m benchmarks.fp8_linear --device cpu --tokens 256 --divide 8
    python -m benchmarks.fp8_linear --device cuda --dtype bfloat16 --tokens 29757
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.vae import ROOT, Candidate, git, peak_bytes, reset_peak, timed
from xicon_infer.ops.linear import MATMULS, Fp8Linear, matmul_problem, quantize_weight

SHAPES = {
    "qkv fused": (5120, 15360),
    "q, k, v or o": (5120, 5120),
    "ffn in": (5120, 13824),
    "ffn out": (13824, 5120),
}
"""Layers of a block: input and output width."""


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    torch.set_num_threads(args.threads)
    report = describe(args)
    for name, (k, n) in SHAPES.items():
        report["layers"][name] = measure(k // args.divide, n // args.divide, args)
    name = f"fp8_linear_{args.device}_{args.tokens}x{5120 // args.divide}_{args.dtype}.json"
    path = args.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"written to {path}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--tokens", type=int, default=256, help="rows of the input")
    parser.add_argument("--divide", type=int, default=1, help="make both widths smaller by this")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each candidate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def measure(k: int, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns seconds, memory and error of each candidate for a layer [n, k]."""
    generator = torch.Generator().manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    x = torch.randn(args.tokens, k, generator=generator).to(args.device, dtype)
    weight = torch.randn(n, k, generator=generator).mul_(0.02).to(args.device)
    bias = torch.randn(n, generator=generator).to(args.device, dtype)
    exact = F.linear(x.float(), weight, bias.float())
    wide = nn.Linear(k, n, device="meta")
    wide.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    wide.bias = nn.Parameter(bias, requires_grad=False)
    found = {"wide": Candidate("wide", lambda: wide(x))}
    result: dict[str, Any] = {"shape": [n, k], "left_out": {}, "ways": {}}
    for matmul in MATMULS:
        problem = matmul_problem(matmul, args.device)
        if problem:
            result["left_out"][matmul] = problem
            continue
        layer = Fp8Linear(k, n, scale_shape=(n, 1), device=args.device)
        layer.weight.data, layer.scale_weight = quantize_weight(weight, per_row=True)
        layer.bias, layer.matmul = wide.bias, matmul
        found[matmul] = Candidate(matmul, lambda layer=layer: layer(x))
    for name, way in found.items():
        before = reset_peak(args.device)
        value = timed(way, args.device)[1]
        result["ways"][name] = {
            "peak_bytes_above_start": peak_bytes(args.device) - before,
            "relative_error": ((value.float() - exact).norm() / exact.norm()).item(),
        }
        del value
    seconds = [[timed(way, args.device)[0] for way in found.values()] for _ in range(args.rounds)]
    medians = dict(zip(found, map(statistics.median, zip(*seconds, strict=True)), strict=True))
    for name, median in medians.items():
        result["ways"][name] |= {
            "median_s": round(median, 6),
            "speed_up": round(medians["wide"] / median, 3),
            "tflop_per_s": round(2 * args.tokens * k * n / median / 1e12, 4),
        }
    return result


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what is needed to repeat the run: command, machine, versions, commit."""
    cuda = args.device.startswith("cuda")
    return {
        "command": shlex.join(["python", "-m", "benchmarks.fp8_linear", *sys.argv[1:]]),
        "tokens": args.tokens,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "clock": "wall" if cuda else "process",
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "cpu": platform.processor() or platform.machine(),
            "threads": args.threads,
        },
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda if cuda else None},
        "commit": git("rev-parse", "HEAD") or "none",
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "layers": {},
    }


if __name__ == "__main__":
    main()
