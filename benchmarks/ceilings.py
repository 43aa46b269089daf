"""What this card reaches: the rates from which the floor of a forward pass is computed.

One bf16 product of 8192^3; the fp8 products of a block at the tokens of 480x832x81, a scale per
tensor and per row, fast accumulation on and off; one self-attention with each kernel that runs
here; a copy of 4 GB on the device and one from pinned memory. Random data: zeros run faster. What
cannot run is named with its reason. Writes one JSON file.

    python -m benchmarks.ceilings --device cuda
    python -m benchmarks.ceilings --tiny
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fp8_linear import SHAPES
from benchmarks.machine import RESULTS, environment, median_seconds, write
from xicon_infer.formulas import Ceiling
from xicon_infer.ops.attention import EIGHT_BIT, attention, kernel_context, probe_backends
from xicon_infer.ops.attention_packages import first_line, kernel_errors
from xicon_infer.ops.linear import quantize_weight

# How often a block calls each layer: cross-attention adds its own q and o to the o of
# self-attention.
CALLS = {"qkv fused": 1, "q, k, v or o": 3, "ffn in": 1, "ffn out": 1}
TINY_DIVIDE = 80


@dataclass(frozen=True)
class Sizes:
    """What is measured: edge of the square product, tokens, heads, divisor of widths, bytes."""

    square: int = 8192
    tokens: int = 32760
    heads: int = 40
    head_dim: int = 128
    divide: int = 1
    copy_bytes: int = 4_000_000_000


TINY = Sizes(64, 48, 2, 16, TINY_DIVIDE, 100_000)


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    if args.device == "cpu":
        torch.set_num_threads(1)
    report = environment("benchmarks.ceilings", args.device)
    report |= measure(args.device, TINY if args.tiny else Sizes(), args.rounds)
    path = write(report, args.out / f"ceilings_{args.device}{'_tiny' if args.tiny else ''}.json")
    print(json.dumps(report["ceiling"], indent=1))
    print(f"written to {path}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


@torch.inference_mode()
def measure(device: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Returns every rate, and the ceiling made of them."""
    report: dict[str, Any] = {
        "sizes": vars(sizes),
        "gemm_bf16": gemm_bf16(device, sizes, rounds),
        "gemm_fp8": gemm_fp8(device, sizes, rounds),
        "attention": attention_rates(device, sizes, rounds),
        "copy": copies(device, sizes, rounds),
    }
    found = ceiling_of(report)
    report["ceiling"] = None if found is None else vars(found)
    return report


def gemm_bf16(device: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Returns the rate of one square bf16 product."""
    n = sizes.square
    a, b = (_normal(device, n, n) for _ in range(2))
    return _rate(2 * n**3, median_seconds(lambda: a @ b, device, rounds=rounds))


def gemm_fp8(device: str, sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """Returns the rate of each fp8 product of a block, kernel alone: nothing is quantised in it."""
    results = []
    for layer, widths in SHAPES.items():
        k, n = (width // sizes.divide for width in widths)
        x, weight = _normal(device, sizes.tokens, k), _normal(device, n, k)
        for scaling in ("tensor", "row"):
            by_row = scaling == "row"
            a, scale_a = quantize_weight(x, per_row=by_row)
            b, scale_b = quantize_weight(weight, per_row=by_row)
            scale_b = scale_b.reshape(1, -1).contiguous() if by_row else scale_b.reshape(())
            scale_a = scale_a if by_row else scale_a.reshape(())
            for fast in (True, False):
                case = {"layer": layer, "k": k, "n": n, "scaling": scaling, "fast_accum": fast}

                def call(
                    a: Tensor = a, b: Tensor = b, sa: Tensor = scale_a, sb: Tensor = scale_b,
                    fast: bool = fast,
                ) -> Tensor:  # fmt: skip
                    return torch._scaled_mm(
                        a, b.t(), sa, sb, out_dtype=torch.bfloat16, use_fast_accum=fast
                    )

                results.append(case | _attempt(call, 2 * sizes.tokens * k * n, device, rounds))
    return results


def attention_rates(device: str, sizes: Sizes, rounds: int) -> dict[str, dict[str, Any]]:
    """Returns the rate of self-attention with each kernel, or why it does not run."""
    dtype = torch.bfloat16
    shape = (1, sizes.tokens, sizes.heads, sizes.head_dim)
    q, k, v = (_normal(device, *shape) for _ in range(3))
    flops = 4 * sizes.heads * sizes.head_dim * sizes.tokens**2
    results: dict[str, dict[str, Any]] = {}
    for probe in probe_backends(torch.device(device), dtype, sizes.head_dim):
        name = probe.name
        if not probe.available:
            results[name] = {"left_out": probe.reason}
        elif name == "math" and device == "cuda":
            results[name] = {"left_out": "it holds all scores: L x L numbers for every head"}
        else:
            with kernel_context(name):
                call = lambda name=name: attention(q, k, v, name)  # noqa: E731
                results[name] = _attempt(call, flops, device, rounds)
    return results


def copies(device: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Returns bytes per second: on the device read and written, from the host only arriving."""
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    on_device = median_seconds(lambda: target.copy_(source), device, rounds=rounds)
    # Pinning 4 GB takes seconds; the rate is the same from a quarter of it.
    host = torch.empty(sizes.copy_bytes // 4, dtype=torch.uint8, pin_memory=device == "cuda")
    part = target[: len(host)]
    arriving = median_seconds(lambda: part.copy_(host, non_blocking=True), device, rounds=rounds)
    return {
        "bytes": sizes.copy_bytes,
        "device_gb_per_s": round(2 * sizes.copy_bytes / on_device / 1e9, 3),
        "host_to_device_gb_per_s": round(len(host) / arriving / 1e9, 3),
        "host_bytes": len(host),
        "host_pinned": device == "cuda",
    }


def ceiling_of(report: dict[str, Any]) -> Ceiling | None:
    """Returns the best rates of a run as a ceiling; None if no attention kernel ran.

    fp8: the faster scaling, over the products of one block in the shares in which it calls them.
    """
    cases = {name: case for name, case in report["attention"].items() if "flop_per_s" in case}
    rates = [case["flop_per_s"] for name, case in cases.items() if name not in EIGHT_BIT]
    narrow = [case["flop_per_s"] for name, case in cases.items() if name in EIGHT_BIT]
    if not rates:
        return None
    return Ceiling(
        gemm_bf16=report["gemm_bf16"]["flop_per_s"],
        gemm_fp8=_block_rate(report["gemm_fp8"]),
        attention_16bit=max(rates),
        attention_8bit=max(narrow, default=None),
        memory=report["copy"]["device_gb_per_s"] * 1e9,
    )


def _block_rate(cases: list[dict[str, Any]]) -> float | None:
    flops, seconds = 0.0, 0.0
    for layer, calls in CALLS.items():
        fits = [case for case in cases if case["layer"] == layer and "median_s" in case]
        if not fits:
            return None
        best = min(fits, key=lambda case: case["median_s"])
        flops += calls * best["flop_per_s"] * best["median_s"]
        seconds += calls * best["median_s"]
    return flops / seconds


def _attempt(call: Any, flops: int, device: str, rounds: int) -> dict[str, Any]:
    """Returns the rate of a call, or why it does not run."""
    try:
        return _rate(flops, median_seconds(call, device, rounds=rounds))
    except kernel_errors() as error:
        return {"left_out": first_line(error)}


def _rate(flops: int, seconds: float) -> dict[str, Any]:
    rate = flops / seconds
    return {"median_s": seconds, "flop_per_s": rate, "tflop_per_s": round(rate / 1e12, 4)}


def _normal(device: str, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.bfloat16, device=device, generator=generator)


if __name__ == "__main__":
    main()
