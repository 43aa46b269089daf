"""Is block swap free? A forward pass with blocks that come over the bus, against the same at rest.

The transformer of Wan 14B with random weights, made on the device. Some of its blocks wait in
page-locked host memory and are copied while others compute (`xicon_infer.ops.offload`). The
formula: swapping s of n blocks costs max(0, s c - n k) seconds, c to copy one block and k to
compute one, so it is free while s c <= n k. c is measured in the same run, alone on the bus; k is
the pass at rest over n. Passes at rest and swapped are timed in the same process, one setting after
the other; that the results are the same is checked. Writes one JSON file.

    python -m benchmarks.swap --device cuda
    python -m benchmarks.swap --device cuda --candidate O1 --swapped 10 40 --tokens 29757
    python -m benchmarks.swap --tiny

On a CPU there is no second queue: a copy holds up the pass, and the figures only show that the
script runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.dit_models import (
    GRIDS,
    SHAPE,
    TINY_GRIDS,
    TINY_SHAPE,
    build_ours,
    candidate,
)
from benchmarks.machine import (
    RESULTS,
    environment,
    median_seconds,
    relative_error,
    seconds_of,
    spread,
    write,
)
from xicon_infer.formulas import DitShape
from xicon_infer.formulas_memory import swap_stall_seconds
from xicon_infer.ops.lanes import lanes_of
from xicon_infer.ops.offload import BlockSwap
from xicon_infer.ops.placing import KV_PROJECTIONS, bring, tensors_of

FREE = 1.02
"""A swap counts as free up to this multiple of the pass at rest: less is lost in the noise."""


@dataclass(frozen=True)
class Case:
    """What is run: the grid of tokens, the settings of s, and how often each pass is timed."""

    tokens: tuple[int, ...]
    swapped: tuple[int, ...]
    rounds: int
    warm_ups: int


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse(argv)
    if args.device == "cpu":
        torch.set_num_threads(1)
    shape, grids = (TINY_SHAPE, TINY_GRIDS) if args.tiny else (SHAPE, GRIDS)
    tokens = tuple(args.tokens or ((48, 16) if args.tiny else (29757, 7917)))
    swapped = tuple(args.swapped or ((1, 2) if args.tiny else (10, 20, 40)))
    report = environment("benchmarks.swap", args.device)
    case = Case(tokens, swapped, args.rounds, 1 if args.tiny else 2)
    report |= measure(args.device, args.candidate, shape, {n: grids[n] for n in tokens}, case)
    path = write(report, args.out / f"swap_{args.device}{'_tiny' if args.tiny else ''}.json")
    for row in report["rows"]:
        print(json.dumps(row))
    print(f"written to {path}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--candidate", default="O3r", help="of ours, as in benchmarks.dit")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 29757 7917")
    parser.add_argument("--swapped", type=int, nargs="+", help="blocks; default: 10 20 40")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


@torch.inference_mode()
def measure(
    device: str, name: str, shape: DitShape, grids: dict[int, tuple[int, int, int]], case: Case
) -> dict[str, Any]:
    """Returns a row for every length and number of swapped blocks, and what a copy takes."""
    forward, _, model = build_ours(candidate(name), shape, device, exact=False)
    blocks = list(model.layers)
    at_rest = {}
    for tokens, grid in grids.items():
        for _ in range(case.warm_ups):
            expected = forward(grid)
        seconds = [seconds_of(lambda grid=grid: forward(grid), device) for _ in range(case.rounds)]
        at_rest[tokens] = (spread(seconds), expected.cpu())
    rows: list[dict[str, Any]] = []
    copied: dict[str, Any] = {}
    for swapped in case.swapped:
        swap = BlockSwap(blocks, swapped, torch.device(device), aside=KV_PROJECTIONS)
        with swap.attached():
            copied = copied or copy_of_a_block(swap, device, case.rounds)
            for tokens, grid in grids.items():
                for _ in range(case.warm_ups):
                    found = forward(grid)
                seconds = [
                    seconds_of(lambda grid=grid: forward(grid), device) for _ in range(case.rounds)
                ]
                rest, expected = at_rest[tokens]
                times = (copied["seconds"], rest["median_s"], len(blocks))
                rows.append(
                    {
                        "tokens": tokens,
                        "swapped": swapped,
                        "blocks": len(blocks),
                        "at_rest": rest,
                        "with_swap": spread(seconds),
                        **compared(spread(seconds)["median_s"], swapped, *times),
                        "relative_difference": relative_error(found.cpu(), expected),
                    }
                )
        swap.close()
        weights = (tensor for block in blocks for tensor in tensors_of(block))
        bring((t for t in weights if not t.is_meta), torch.device(device))  # as it was
    return {
        "candidate": name,
        "layers": shape.layers,
        "overlaps": device != "cpu",
        "copy": copied,
        "rows": rows,
    }


def compared(
    measured: float, swapped: int, copy_s: float, at_rest: float, blocks: int
) -> dict[str, Any]:
    """Returns what the formula says of a pass, and how far the measured seconds are from it."""
    stall = swap_stall_seconds(copy_s, at_rest / blocks, blocks, swapped)
    return {
        "predicted_s": round(at_rest + stall, 6),
        "predicted_free": stall == 0.0,
        "slowdown": round(measured / at_rest, 4),
        "free": measured <= FREE * at_rest,
        "measured_over_predicted": round(measured / (at_rest + stall), 4),
    }


def copy_of_a_block(swap: BlockSwap, device: str, rounds: int) -> dict[str, Any]:
    """Returns what the copy of one block takes alone, over the same bus and from locked memory."""
    size = swap.host_bytes // len(swap.order)
    lanes = lanes_of(torch.device(device))
    host, buffer = torch.randint(0, 255, (size,), dtype=torch.uint8), lanes.empty(size)
    pinned = lanes.pin(host)
    try:
        seconds = median_seconds(
            lambda: buffer.copy_(host, non_blocking=True), device, rounds=rounds
        )
    finally:
        if pinned:
            lanes.unpin(host)
    return {
        "bytes": size,
        "seconds": round(seconds, 9),
        "gb_per_s": round(size / seconds / 1e9, 2),
        "pinned": pinned,
    }


if __name__ == "__main__":
    main()
