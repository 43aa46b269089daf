"""How fast are the matrix products of a block, by how the weight is stored and multiplied?

The five products of Wan2.1 14B at the tokens of 480x832x81 (32,760), SCAIL 416x672x81 (29,757) and
17 frames (7,917): in bf16, in fp8 with a scale per row and per tensor, and fp8 weights brought to
bf16 at every call. Each fp8 product twice: the product alone, its input rounded already, and with
the pass that rounds it. In turns; random numbers; the error is that of some rows against float32.
What does not run is named with its reason. Writes one JSON file.

    python -m benchmarks.gemm --device cuda
    python -m benchmarks.gemm --tiny
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import RESULTS, environment, relative_error, seconds_of, spread, write
from xicon_infer.ops import fused_eager
from xicon_infer.ops.linear import Fp8Linear, QuantizedRows, matmul_problem, quantize_weight

TOKENS = (32760, 29757, 7917)
TINY_TOKENS = (48,)
TINY_DIVIDE = 32
SHAPES = {
    "qkv fused": (5120, 15360),
    "k and v fused": (5120, 10240),
    "q, k, v or o": (5120, 5120),
    "ffn in": (5120, 13824),
    "ffn out": (13824, 5120),
}
"""Products of a block: input and output width. The second is what a sliced query leaves."""

WARM_UPS = 2
CHECKED_ROWS = 256
SPREAD = 0.02

Call = Callable[[], Tensor]


def main(words: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse(words)
    if args.device == "cpu":
        torch.set_num_threads(1)
    report = environment("benchmarks.gemm", args.device)
    report |= measure(args)
    path = write(report, args.out / f"gemm_{args.device}{'_tiny' if args.tiny else ''}.json")
    print(table(report))
    print(f"written to {path}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", help="rows of the input")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(words)


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of every product at every number of tokens."""
    divide = TINY_DIVIDE if args.tiny else 1
    cases = [
        measure_one(name, tokens, (k // divide, n // divide), args)
        for tokens in args.tokens or (TINY_TOKENS if args.tiny else TOKENS)
        for name, (k, n) in SHAPES.items()
    ]
    return {"dtype": "bfloat16", "rounds": args.rounds, "cases": cases}


def measure_one(
    name: str, tokens: int, widths: tuple[int, int], args: argparse.Namespace
) -> dict[str, Any]:
    """Returns seconds, rate and error of every way to multiply [tokens, K] by [N, K]."""
    k, n = widths
    x = _normal(args.device, tokens, k).to(torch.bfloat16)
    weight = _normal(args.device, n, k) * SPREAD
    exact = F.linear(x[:CHECKED_ROWS].float(), weight)
    calls, left_out = ways(x, weight)
    problems = {way: refusal(call) for way, call in calls.items()}
    left_out |= {way: problem for way, problem in problems.items() if problem}
    calls = {way: call for way, call in calls.items() if not problems[way]}
    errors = {way: relative_error(call()[:CHECKED_ROWS], exact) for way, call in calls.items()}
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for turn in range(WARM_UPS + args.rounds):
        for way, call in calls.items():
            taken = seconds_of(call, args.device)
            if turn >= WARM_UPS:
                seconds[way].append(taken)
    found = {way: spread(taken) | {"relative_error": errors[way]} for way, taken in seconds.items()}
    for each in found.values():
        each["tflop_per_s"] = round(2 * tokens * k * n / max(each["median_s"], 1e-9) / 1e12, 4)
        each["speed_up"] = round(found["bf16"]["median_s"] / max(each["median_s"], 1e-9), 3)
    return {
        "product": name, "tokens": tokens, "k": k, "n": n, "ways": found, "left_out": left_out,
    }  # fmt: skip


def refusal(call: Call) -> str:
    """Returns why a call does not run at this shape, or "" if it does."""
    try:
        call()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ""


def ways(x: Tensor, weight: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """Returns every way to multiply, and why others are left out."""
    wide = weight.to(torch.bfloat16)
    calls: dict[str, Call] = {"bf16": lambda: F.linear(x, wide)}
    left_out: dict[str, str] = {}
    dequantised = fp8_layer(weight, per_row=False)
    calls["fp8 dequantised"] = lambda: dequantised(x)
    for matmul, says in (("scaled_mm_row", "fp8 row"), ("scaled_mm_tensor", "fp8 tensor")):
        if problem := matmul_problem(matmul, str(x.device)):  # type: ignore[arg-type]
            left_out[says] = problem
            continue
        layer = fp8_layer(weight, per_row=matmul == "scaled_mm_row")
        layer.matmul = matmul  # type: ignore[assignment]
        calls[f"{says}, with the rounding pass"] = lambda layer=layer: layer(x)  # type: ignore[misc]
        if matmul == "scaled_mm_row":
            rows = QuantizedRows(*fused_eager.quantize(x.float()), torch.bfloat16)
            calls[says] = lambda layer=layer, rows=rows: layer(rows)  # type: ignore[misc]
        else:
            calls[says] = tensor_product(x, layer)
    return calls, left_out


def fp8_layer(weight: Tensor, *, per_row: bool) -> Fp8Linear:
    """Returns a layer without a bias that holds a weight [N, K] as e4m3."""
    n, k = weight.shape
    layer = Fp8Linear(k, n, bias=False, device="meta")
    values, layer.scale_weight = quantize_weight(weight, per_row=per_row)
    layer.weight = nn.Parameter(values, requires_grad=False)
    return layer


def tensor_product(x: Tensor, layer: Fp8Linear) -> Call:
    """Returns the product alone, with one scale for the input and one for the weight."""
    values, scale = quantize_weight(x)
    scale_x, scale_w = scale.reshape(()), layer.scale_weight
    assert scale_w is not None

    def call() -> Tensor:
        return torch._scaled_mm(
            values,
            layer.weight.t(),
            scale_x,
            scale_w.reshape(()),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return call


def table(report: dict[str, Any]) -> str:
    """Returns the figures as lines."""
    lines = []
    for case in report["cases"]:
        lines.append(f"{case['product']}: {case['tokens']} x {case['k']} x {case['n']}")
        for way, found in case["ways"].items():
            lines.append(
                f"  {way:<32} {found['median_s'] * 1e3:9.3f} ms {found['tflop_per_s']:9.1f} TFLOP/s"
                f" x{found['speed_up']:<6} error {found['relative_error']:.1e}"
            )
        lines += [f"  {way:<32} {why}" for way, why in case["left_out"].items()]
    return "\n".join(lines)


def _normal(device: str, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, device=device, generator=generator)


if __name__ == "__main__":
    main()
