"""How fast is one forward pass of the 14B transformer, against diffusers' in the same run?

Candidates (`benchmarks/dit_models.py`) have a process each and run in turns (A B C A B C ...): kept
waiting in memory where all fit on the card, else started anew each turn. Random weights of the
full width, made on the device; with fewer than 40 layers seconds are scaled to 40 and the result
says so. At least 3 calls before and 5 that count, timed with CUDA events; the first call is told
apart. A turn whose SM clock fell below 90 % of the first turn's does not count. The floor is
computed from the rates of `benchmarks.ceilings` in the same run. Writes one JSON file, anew after
each step, so that a run cut short leaves what it has.

    python -m benchmarks.dit --device cuda
    python -m benchmarks.dit --device cuda --layers 8 --tokens 32760 --candidates B0 B1 O1 O1@flash
    python -m benchmarks.dit --tiny
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.dit_models import (
    BASELINE,
    CANDIDATES,
    GRIDS,
    SHAPE,
    TINY_GRIDS,
    TINY_SHAPE,
    Candidate,
    candidate,
)
from benchmarks.dit_process import Process, WorkerFailed
from benchmarks.dit_switches import switches
from benchmarks.machine import LEAST_CLOCK, RESULTS, ROOT, environment, spread, write
from xicon_infer.formulas import (
    H100,
    Ceiling,
    DitShape,
    activation_bytes,
    floor_seconds,
    forward_flops,
    weight_bytes,
)
from xicon_infer.ops.attention import EIGHT_BIT

TOKENS = (32760, 29757, 24024, 7917)
TINY_TOKENS = (48, 32)
WARM_UPS = 3
TURNS = 3
WHAT_IT_RAN = (
    "plain Wan image-to-video with as many tokens; ours with cached keys and values of the context "
    "and without their weights, diffusers projects them at every call as it does by default"
)
# A process keeps CUDA's own memory, and eager code keeps several float32 copies of the tokens.
CONTEXT_BYTES = 600_000_000
EAGER_COPIES = 3


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    ends = time.monotonic() + args.budget
    report: dict[str, Any] = environment("benchmarks.dit", args.device) | {
        "what": WHAT_IT_RAN,
        "layers": args.layers,
        "scaled_to_layers": full_shape(args).layers,
        "says": scaling_note(args),
        "left_out": [],
    }
    path = args.out / file_name(args)
    report["ceilings"] = ceilings(args)
    chosen = usable(args, report)
    pool = Pool(args, chosen, keep=all_fit(args, chosen))
    report["processes"] = "kept" if pool.keep else "started anew each turn"
    try:
        for _ in steps(args, pool, report, ends):
            report["switches"] = switches(report)
            write(report, path)
    finally:
        pool.close()
    write(report, path)
    print("\n".join([report["says"], *report["left_out"]]))
    for tokens, results in report["results"].items():
        for name, found in results.items():
            print(f"{tokens:>6} {name:<12} {found['median_s']:9.4f} s")
    print(f"written to {path}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--layers", type=int, help="blocks to run; all by default")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"of {', '.join(map(str, GRIDS))}")
    parser.add_argument("--candidates", nargs="+", type=candidate, help="NAME or NAME@KERNEL")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each candidate")
    parser.add_argument("--rounds", type=int, default=2, help="calls that count in a turn")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds; then it stops")
    parser.add_argument("--no-profile", action="store_true", help="no breakdown by kernel")
    parser.add_argument("--no-errors", action="store_true", help="no errors against float32")
    parser.add_argument("--ceilings", type=Path, help="JSON of benchmarks.ceilings of the same run")
    parser.add_argument("--tag", default="", help="goes into the file name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.layers = args.layers or (TINY_SHAPE if args.tiny else SHAPE).layers
    args.tokens = args.tokens or (TINY_TOKENS if args.tiny else TOKENS)
    args.candidates = args.candidates or list(CANDIDATES.values())
    known = TINY_GRIDS if args.tiny else GRIDS
    if unknown := [tokens for tokens in args.tokens if tokens not in known]:
        parser.error(f"--tokens {unknown}: allowed are {', '.join(map(str, known))}")
    if not args.tiny and args.device == "cpu":
        parser.error("the full width needs --device cuda; on a CPU run --tiny")
    return args


def full_shape(args: argparse.Namespace) -> DitShape:
    """Returns the sizes of the whole model that results are scaled to."""
    return TINY_SHAPE if args.tiny else SHAPE


def scaling_note(args: argparse.Namespace) -> str:
    """Returns the sentence about layers that were not run."""
    whole = full_shape(args).layers
    if args.layers == whole:
        return f"all {whole} layers were run"
    return (
        f"{args.layers} of {whole} layers were run; seconds are multiplied by "
        f"{whole / args.layers:g}, which counts what is outside the blocks too often"
    )


def file_name(args: argparse.Namespace) -> str:
    """Returns the name of the result."""
    words = ["dit", args.device, f"{args.layers}layers", *(["tiny"] if args.tiny else [])]
    return "_".join([*words, *([args.tag] if args.tag else [])]) + ".json"


def ceilings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the rates of this card: from a file of the same run, or measured now."""
    if args.ceilings is not None:
        if not args.ceilings.exists():  # that run failed: the seconds are worth having without
            return {"ceiling": None, "left_out": f"{args.ceilings.name} is not there"}
        return json.loads(args.ceilings.read_text(encoding="utf-8"))
    tiny = ["--tiny", "--rounds", "2"] if args.tiny else []
    command = ["benchmarks.ceilings", "--device", args.device, "--out", str(args.out), *tiny]
    subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    path = args.out / f"ceilings_{args.device}{'_tiny' if args.tiny else ''}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def usable(args: argparse.Namespace, report: dict[str, Any]) -> list[Candidate]:
    """Returns the candidates whose packages are installed; the others are named in the report."""
    chosen: list[Candidate] = []
    for each in args.candidates:
        missing = [name for name in each.needs if find_spec(name) is None]
        if missing:
            says = f"{each.name}: the package {missing[0]} is not installed"
            report["left_out"].append(says)
        else:
            chosen.append(each)
    report["candidates"] = {each.name: each.says for each in chosen}
    report["results"] = {str(tokens): {} for tokens in args.tokens}
    report["errors"], report["breakdown"] = {}, {}
    return chosen


def all_fit(args: argparse.Namespace, chosen: list[Candidate]) -> bool:
    """Returns whether all candidates can wait in memory while one runs."""
    if args.device == "cpu":
        return True
    import torch

    shape = replace(SHAPE, layers=args.layers)
    held = sum(CONTEXT_BYTES + weight_bytes(shape, 1 if each.matmul else 2) for each in chosen)
    tokens = max(args.tokens)
    working = activation_bytes(shape, tokens) + EAGER_COPIES * tokens * shape.dim * 4
    return held + working < 0.9 * torch.cuda.mem_get_info()[0]


class Pool:
    """The processes of the candidates; a candidate that failed is not started again.

    Args:
        args: the command line.
        chosen: the candidates.
        keep: whether processes stay between their turns.
    """

    def __init__(self, args: argparse.Namespace, chosen: list[Candidate], *, keep: bool) -> None:
        self.args, self.chosen, self.keep = args, chosen, keep
        self.failed: dict[str, str] = {}
        self.built: dict[str, dict[str, Any]] = {}
        self.building: set[str] = set()
        self.open: dict[str, Process] = {}
        if keep and args.device == "cuda":  # import and build side by side
            for each in chosen:
                self.start(each.name)

    def start(self, name: str) -> None:
        """Starts the process of a candidate; it builds its model while others are asked."""
        self.open[name] = Process(name, self.args)
        self.building.add(name)

    def ask(self, each: Candidate, order: dict[str, Any], limit: float) -> dict[str, Any] | None:
        """Returns the answer of a candidate, None if it failed now or before.

        Args:
            each: the candidate.
            order: what it shall do.
            limit: seconds after which it is ended.
        """
        if each.name in self.failed:
            return None
        ends = time.monotonic() + limit
        try:
            if each.name not in self.open:
                self.start(each.name)
            for name in sorted(self.building):  # nobody builds while somebody is timed
                self.wait_for(name, ends - time.monotonic())
            if each.name in self.failed:
                return None
            answer = self.open[each.name].ask(order, ends - time.monotonic())
        except WorkerFailed as error:
            self.fail(each.name, error)
            return None
        if not self.keep:
            self.open.pop(each.name).close()
        return answer

    def wait_for(self, name: str, limit: float) -> None:
        """Waits until the model of a process is built; ends it if it cannot be."""
        self.building.remove(name)
        try:
            self.built[name] = self.open[name].answer(limit)
        except WorkerFailed as error:
            self.fail(name, error)

    def fail(self, name: str, error: WorkerFailed) -> None:
        """Ends the process of a candidate for good."""
        self.failed[name] = str(error)
        self.open.pop(name).close()

    def close(self) -> None:
        """Ends all processes."""
        for process in self.open.values():
            process.close()
        self.open.clear()


def steps(
    args: argparse.Namespace, pool: Pool, report: dict[str, Any], ends: float
) -> Iterator[None]:
    """Runs everything step by step; after each the report is worth keeping.

    What the budget does not reach is named in `left_out`, as is every candidate that failed.
    """
    told: set[str] = set()
    for each, order, name in planned(args, pool.chosen, keep=pool.keep):
        left = ends - time.monotonic()
        if left <= 0:
            report["left_out"].append(f"{name}: the budget of {args.budget:g} s was used up")
            continue
        answer = pool.ask(each, order, left)
        report["built"] = pool.built
        if answer is not None:
            keep_answer(args, report, each, order, answer)
        elif each.name not in told:
            told.add(each.name)
            report["left_out"].append(f"{name}: {pool.failed[each.name]}")
        yield


def planned(
    args: argparse.Namespace, chosen: list[Candidate], *, keep: bool
) -> Iterator[tuple[Candidate, dict[str, Any], str]]:
    """Yields candidate, order and name of every step: times in turns first, by length.

    A process that was kept is warm after its first turn.
    """
    for tokens in args.tokens:
        for turn in range(args.turns):
            warm_ups = 1 if keep and turn else WARM_UPS
            order = {"do": "time", "tokens": tokens, "warm_ups": warm_ups, "rounds": args.rounds}
            for each in chosen:
                yield each, order, f"{each.name}, {tokens} tokens, turn {turn + 1}"
    for each in chosen:
        if not args.no_errors:
            yield each, {"do": "error"}, f"{each.name}, error"
    for each in chosen:
        if not args.no_profile:
            order = {"do": "profile", "tokens": args.tokens[0]}
            yield each, order, f"{each.name}, breakdown"


def keep_answer(
    args: argparse.Namespace,
    report: dict[str, Any],
    each: Candidate,
    order: dict[str, Any],
    answer: dict[str, Any],
) -> None:
    """Adds an answer to the report and brings the figures that follow from it up to date."""
    if order["do"] == "error":
        error = answer["relative_error"]
        report["errors"][each.name] = {
            "relative_l2": error, "gate": each.gate, "within": error <= each.gate
        }  # fmt: skip
    elif order["do"] == "profile":
        report["breakdown"][each.name] = {"tokens": order["tokens"], **answer}
    else:
        results = report["results"][str(order["tokens"])]
        results.setdefault(each.name, {"turns": []})["turns"].append(answer)
        rates = report["ceilings"]["ceiling"]
        ceiling = None if rates is None else Ceiling(**rates)
        for name in results:
            results[name] |= figures(results, name, args, order["tokens"], ceiling)


def figures(
    results: dict[str, Any],
    name: str,
    args: argparse.Namespace,
    tokens: int,
    ceiling: Ceiling | None,
) -> dict[str, Any]:
    """Returns what the turns of a candidate amount to, for the whole model."""
    shape, each = full_shape(args), candidate(name)
    scale = shape.layers / args.layers
    counted = counted_turns(results[name]["turns"])
    seconds = [scale * s for turn in counted for s in turn["seconds"]]
    forward = median(seconds)
    found = spread(seconds) | {
        "first_call_s": round(results[name]["turns"][0]["first_call_s"], 4),
        "turns_not_counted": len(results[name]["turns"]) - len(counted),
        "tflop_per_s": round(forward_flops(shape, tokens) / forward / 1e12, 4),
        "peak_allocated_bytes": max(turn["peak_allocated_bytes"] for turn in counted),
        "peak_reserved_bytes": max(turn.get("peak_reserved_bytes") or 0 for turn in counted),
        "spec_floor_s": round(floor_seconds(shape, tokens, H100, fp8=each.fp8_products), 4),
    }
    eight = counted[-1].get("attention") in EIGHT_BIT
    found["attention"] = counted[-1].get("attention")
    if ceiling is not None and (ceiling.gemm_fp8 or not each.fp8_products):
        eight = eight and ceiling.attention_8bit is not None
        floor = floor_seconds(shape, tokens, ceiling, fp8=each.fp8_products, attention_8bit=eight)
        found |= {
            "floor_s": floor,
            "times_the_floor": round(forward / floor, 3),
            "share_of_the_floor": round(floor / forward, 4),
        }
    if BASELINE in results:
        base = [s for turn in counted_turns(results[BASELINE]["turns"]) for s in turn["seconds"]]
        found["speed_up"] = round(scale * median(base) / forward, 3)
    return found


def counted_turns(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the turns at whose end the SM clock was at least 90 % of the first turn's."""
    clocks = [(turn["card_after"] or {}).get("sm_clock_mhz") for turn in turns]
    first = clocks[0]
    if first is None:
        return turns
    pairs = zip(turns, clocks, strict=True)
    return [turn for turn, clock in pairs if clock is None or clock >= LEAST_CLOCK * first]


if __name__ == "__main__":
    main()
