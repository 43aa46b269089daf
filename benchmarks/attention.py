"""Which attention kernel is fastest at the lengths of real jobs, and what does it lose?

Every kernel that runs here, in turns, beside what PyTorch takes when it is left alone; the ways
to cut the work of our 8-bit kernel one by one. Self-attention at the tokens of 480x832x81
(32,760), SCAIL 416x672x81 with and without a pose (29,757 and 24,024) and 17 frames (7,917);
cross-attention to 512 text and 257 image tokens. The error is that of some queries and heads
against float32. Random numbers; a kernel that does not run is named with its reason. Writes one
JSON file, anew after each shape.

    python -m benchmarks.attention --device cuda
    python -m benchmarks.attention --device cuda --tokens 32760 --no-cuts
    python -m benchmarks.attention --tiny
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import RESULTS, environment, relative_error, seconds_of, spread, write
from xicon_infer.ops.attention import (
    EIGHT_BIT,
    Backend,
    attention,
    kernel_context,
    probe_backends,
)
from xicon_infer.ops.attention_int8 import key_mean
from xicon_infer.ops.attention_packages import first_line, kernel_errors
from xicon_infer.ops.attention_race import Shape, random_parts

TOKENS = (32760, 29757, 24024, 7917)
CROSS = (512, 257)
TINY_TOKENS = (48, 37)
TINY_CROSS = (16,)
PEER = "PyTorch's choice"
"""`scaled_dot_product_attention` without a word on which kernel to use."""

WARM_UPS = 2
CHECKED_QUERIES = 128
CHECKED_HEADS = 4

Parts = tuple[Tensor, Tensor, Tensor]


class Entry(NamedTuple):
    """One way to attend: its name, the context it is run in, and the call."""

    name: str
    context: Callable[[], AbstractContextManager[None]]
    call: Callable[[Tensor, Tensor, Tensor], Tensor]


def main(words: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse(words)
    if args.device == "cpu":
        torch.set_num_threads(1)
    report = environment("benchmarks.attention", args.device)
    path = args.out / f"attention_{args.device}{'_tiny' if args.tiny else ''}.json"
    for figures in measure(args, shapes_of(args)):
        report |= figures
        write(report, path)
    print(table(report))
    print(f"written to {path}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of self-attention")
    parser.add_argument("--cross", type=int, nargs="*", help="keys of cross-attention")
    parser.add_argument("--no-cuts", action="store_true", help="our 8-bit kernel as it is, only")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(words)


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """Returns what is measured: every self-attention, then cross-attention of the first length."""
    heads, width = (2, 64) if args.tiny else (40, 128)
    tokens = args.tokens or (TINY_TOKENS if args.tiny else TOKENS)
    keys = (TINY_CROSS if args.tiny else CROSS) if args.cross is None else args.cross
    own = [Shape(1, length, length, heads, width) for length in tokens]
    return own + [own[0]._replace(keys=count) for count in keys]


@torch.inference_mode()
def measure(args: argparse.Namespace, shapes: Sequence[Shape]) -> Iterator[dict[str, Any]]:
    """Yields the figures of the shapes so far, after each."""
    device, dtype = torch.device(args.device), torch.bfloat16
    probes = probe_backends(device, dtype, shapes[0].head_dim)
    absent = {probe.name: probe.reason for probe in probes if not probe.available}
    running = [probe.name for probe in probes if probe.available]
    if device.type == "cuda" and "math" in running:
        absent["math"] = "it holds all scores: L x L numbers for every head"
        running.remove("math")
    entries = list(entries_of(running, device, shapes[0].head_dim, cuts=not args.no_cuts))
    cases = []
    for shape in shapes:
        cases.append(case_of(shape, entries, device, dtype, args.rounds))
        yield {"dtype": "bfloat16", "absent": absent, "cases": cases}


def entries_of(
    running: Sequence[Backend], device: torch.device, head_dim: int, *, cuts: bool
) -> Iterator[Entry]:
    """Yields the peer, every kernel that runs, and every cut of our own."""
    yield Entry(PEER, nullcontext, _left_alone)
    for name in running:
        context = functools.partial(kernel_context, name)
        yield Entry(name, context, functools.partial(attention, backend=name))
    if cuts and device.type == "cuda" and "int8" in running:
        from xicon_infer.ops.attention_int8_triton import configs_for, launch

        for config in configs_for(torch.cuda.get_device_capability(device), head_dim):
            name = f"int8, {config.queries} queries, {config.warps} warps, {config.stages} stages"
            call = lambda q, k, v, config=config: launch(q, k, v, key_mean(k), config)  # noqa: E731
            yield Entry(name, nullcontext, call)


def case_of(
    shape: Shape,
    entries: Sequence[Entry],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, Any]:
    """Returns the figures of one shape: seconds, TFLOP/s and error of every entry."""
    parts = random_parts(shape, device, dtype)
    exact, heads, rows = reference(parts)
    flops = 4 * shape.batch * shape.heads * shape.head_dim * shape.queries * shape.keys
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for entry in entries:
        try:
            with entry.context():
                first = seconds_of(lambda e=entry: e.call(*parts), str(device))
                out = entry.call(*parts)[:, rows, :heads]
        except kernel_errors() as error:
            found[entry.name] = {"left_out": first_line(error)}
            continue
        found[entry.name] = {"first_s": round(first, 6), "error": relative_error(out, exact)}
        times[entry.name] = []
    for turn in range(WARM_UPS + rounds):
        for entry in (entry for entry in entries if entry.name in times):
            with entry.context():
                seconds = seconds_of(lambda e=entry: e.call(*parts), str(device))
            if turn >= WARM_UPS:
                times[entry.name].append(seconds)
    for name, seconds_list in times.items():
        told = spread(seconds_list)
        rate = flops / told["median_s"] / 1e12 if told["median_s"] else 0.0
        found[name] |= told | {"tflop_per_s": round(rate, 4)}
    case = {"shape": shape._asdict(), "flop": flops, "kernels": found}
    return case | {"fastest": fastest_of(found)}


def reference(parts: Parts) -> tuple[Tensor, int, slice]:
    """Returns attention in float32 of some queries and heads, their number, and which they are."""
    q, k, v = parts
    heads = min(CHECKED_HEADS, q.shape[2])
    step = max(1, q.shape[1] // CHECKED_QUERIES)
    rows = slice(0, step * CHECKED_QUERIES, step)
    chosen = (q[:, rows, :heads], k[:, :, :heads], v[:, :, :heads])
    wide_q, wide_k, wide_v = (part.float().transpose(1, 2) for part in chosen)
    scores = wide_q @ wide_k.mT / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ wide_v).transpose(1, 2), heads, rows


def fastest_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the fastest of all, of those that are exact, and how far ahead of the peer it is."""
    timed = {name: case["median_s"] for name, case in found.items() if "median_s" in case}
    exact = {name: s for name, s in timed.items() if name.split(",")[0] not in EIGHT_BIT}
    best = {"any": min(timed, key=timed.__getitem__), "exact": min(exact, key=exact.__getitem__)}
    if PEER not in timed:
        return best
    return best | {
        f"{name}_over_peer": round(timed[PEER] / timed[kernel], 3) if timed[kernel] else None
        for name, kernel in best.items()
    }


def table(report: dict[str, Any]) -> str:
    """Returns the figures as lines of text."""
    lines = []
    for case in report["cases"]:
        shape = case["shape"]
        lines.append(f"{shape['queries']} queries x {shape['keys']} keys")
        for name, found in case["kernels"].items():
            if "left_out" in found:
                lines.append(f"  {name:<40} {found['left_out']}")
                continue
            rate, error = found["tflop_per_s"], found["error"]
            lines.append(
                f"  {name:<40} {1e3 * found['median_s']:9.3f} ms {rate:9.3f} TFLOP/s {error:.2e}"
            )
    return "\n".join(lines)


def _left_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2)


if __name__ == "__main__":
    main()
