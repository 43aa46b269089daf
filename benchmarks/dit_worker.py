"""One candidate of `benchmarks.dit` in a process of its own.

Reads one order per line of standard input, as JSON, and answers each with one line that begins
with `MARK`; what libraries print goes by. Started by `benchmarks.dit`, not by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.dit_models import (
    GRIDS,
    SHAPE,
    TINY_GRIDS,
    TINY_SHAPE,
    Built,
    build_candidate,
    candidate,
)
from benchmarks.machine import card_state, relative_error, seconds_of
from benchmarks.vae import peak_bytes, reset_peak, synchronize

MARK = "answer: "
SLICE_LAYERS = 2
SLICE_TOKENS = 4096
TINY_SLICE_TOKENS = 16

# Names of kernels on CUDA and of operators on the CPU; the first that fits counts.
KINDS = (
    ("attention", re.compile(r"flash|fmha|sdpa|attention|softmax", re.IGNORECASE)),
    ("gemm", re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitK|mm\b|conv", re.IGNORECASE)),
    ("copy", re.compile(r"memcpy|memset", re.IGNORECASE)),
)

Forward = Callable[[tuple[int, int, int]], Tensor]


def main() -> None:
    """Builds the candidate and follows orders until there are no more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--candidate", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    for answer in answers(args, (json.loads(line) for line in sys.stdin)):
        print(MARK + json.dumps(answer), flush=True)


def answers(args: argparse.Namespace, orders: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields what building told, then the answer to each order.

    Orders: {"do": "time", "tokens", "warm_ups", "rounds"}, {"do": "profile", "tokens"},
    {"do": "error"}.
    """
    found = candidate(args.candidate)
    shape = replace(TINY_SHAPE if args.tiny else SHAPE, layers=args.layers)
    grids = TINY_GRIDS if args.tiny else GRIDS
    with torch.inference_mode():
        before = reset_peak(args.device)
        built = build_candidate(found, shape, args.device)
        forward = built.forward
        release(args.device)
        reset_peak(args.device)
        yield {"attention": built.attention, "weight_bytes": peak_bytes(args.device) - before}
        for order in orders:
            if order["do"] == "time":
                turn = timed_turn(forward, grids[order["tokens"]], order, args.device)
                yield turn | kernels_of(built)
            elif order["do"] == "profile":
                yield breakdown(forward, grids[order["tokens"]], args)
            else:
                yield {"relative_error": slice_error(args)}
            release(args.device)


def timed_turn(
    forward: Forward, grid: tuple[int, int, int], order: dict[str, Any], device: str
) -> dict[str, Any]:
    """Returns the seconds of a turn: its first call apart, then those that count.

    Between turns the card idles and its clock falls: every turn begins with calls that do not
    count.
    """
    reset_peak(device)
    first = seconds_of(lambda: forward(grid), device)
    for _ in range(order["warm_ups"] - 1):
        forward(grid)
    synchronize(device)
    before = card_state() if device == "cuda" else None
    seconds = [seconds_of(lambda: forward(grid), device) for _ in range(order["rounds"])]
    return {
        "first_call_s": first,
        "seconds": seconds,
        "card_before": before,
        "card_after": card_state() if device == "cuda" else None,
        "peak_allocated_bytes": peak_bytes(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
    }


def kernels_of(built: Built) -> dict[str, str]:
    """Returns what a pass ran with; attention may be chosen by the length, at its first pass."""
    if built.model is None:
        return {"attention": built.attention}
    return {"attention": built.model.backend, "kernels": built.model.kernels}


def slice_error(args: argparse.Namespace) -> float:
    """Returns the relative L2 error of a slice of two blocks, against float32 weights and sums."""
    shape = replace(TINY_SHAPE if args.tiny else SHAPE, layers=SLICE_LAYERS)
    grid = TINY_GRIDS[TINY_SLICE_TOKENS] if args.tiny else GRIDS[SLICE_TOKENS]
    found = candidate(args.candidate)
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = build_candidate(found, shape, args.device, exact=True).forward(grid)
    return relative_error(build_candidate(found, shape, args.device).forward(grid), exact)


def breakdown(
    forward: Forward, grid: tuple[int, int, int], args: argparse.Namespace
) -> dict[str, Any]:
    """Returns milliseconds per block by kind of kernel, of one profiled forward pass.

    The mean over the blocks; what is outside them is below 1 % and counted in. Gaps: time in
    which no kernel ran, between the first and the last; on the CPU what no operator accounts for.
    """
    cuda = args.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronize(args.device)
    with profile(activities=activities) as recorded:
        elapsed = seconds_of(lambda: forward(grid), args.device) * 1e6
    if cuda:
        spans = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in recorded.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            # Ranges that torch.compile marks on the device hold the kernels that are listed too.
            and not getattr(event, "is_user_annotation", False)
        ]
        times = [(name, end - start) for name, start, end in spans]
        gaps = idle(sorted((start, end) for _, start, end in spans))
    else:
        times = [(row.key, row.self_cpu_time_total) for row in recorded.key_averages()]
        gaps = max(0.0, elapsed - sum(duration for _, duration in times))
    return summed(times, gaps, args.layers)


def summed(times: list[tuple[str, float]], gaps: float, layers: int) -> dict[str, Any]:
    """Returns milliseconds per block by kind, and the kernels that took most."""
    kinds = dict.fromkeys((*(kind for kind, _ in KINDS), "elementwise"), 0.0)
    kernels: dict[str, float] = {}
    for name, duration in times:
        kinds[kind_of(name)] += duration
        kernels[name[:120]] = kernels.get(name[:120], 0.0) + duration
    per_block = {kind: total / layers / 1e3 for kind, total in (kinds | {"gaps": gaps}).items()}
    total = sum(per_block.values()) or 1.0
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:12]
    return {
        "ms_per_block": {kind: round(ms, 4) for kind, ms in per_block.items()},
        "share": {kind: round(ms / total, 4) for kind, ms in per_block.items()},
        "calls_per_block": round(len(times) / layers, 1),
        "longest": {name: round(duration / layers / 1e3, 4) for name, duration in longest},
    }


def kind_of(kernel: str) -> str:
    """Returns the kind of work of a kernel, by its name."""
    return next((kind for kind, names in KINDS if names.search(kernel)), "elementwise")


def idle(spans: list[tuple[float, float]]) -> float:
    """Returns how long none of the spans was open, between the first and the last."""
    gaps, reached = 0.0, spans[0][1] if spans else 0.0
    for start, end in spans:
        gaps += max(0.0, start - reached)
        reached = max(reached, end)
    return gaps


def release(device: str) -> None:
    """Gives memory that is not in use back to the card: other candidates wait beside this one."""
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
