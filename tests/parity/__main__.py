"""`python -m tests.parity DIR...`: replays every golden file below the folders.

    python -m tests.parity tests/golden
    python -m tests.parity --device cuda --dtype bf16 tests/golden

With a device or a dtype, the networks run there and so, and must reach the class of that arithmetic
(`tests.parity.target`); what has no network is replayed as ever. `--json PATH` writes the
comparisons besides, `--networks` passes over files that have none.

Prints one line per comparison, `name  rel_err  tolerance  ok|FAIL|SKIP reason`, and a count.
Exits with 1 if anything fails, with 2 if there is nothing to replay. READMEs and pictures are
passed over. A file of a kind that nothing here can replay is a SKIP: it counts as missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from pathlib import Path

import torch

from tests.parity.golden import Check, Golden
from tests.parity.replays import NETWORKS, REPLAYS
from tests.parity.target import CPU, KINDS, Target

SUFFIXES = {".safetensors", ".json", ".npz"}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    args = parse(arguments)
    roots: list[Path] = args.folders
    missing = [str(r) for r in roots if not r.exists()]
    if not roots or missing:
        print(f"usage: python -m tests.parity DIR...  (not found: {', '.join(missing) or '-'})")
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no GPU; leave --device out to replay on the CPU")
        return 2
    target = Target(torch.device(args.device), args.dtype)
    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
    torch.manual_seed(0)
    files = golden_files(roots)
    if args.networks:
        files = [path for path in files if has_network(path, roots)]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        checks = [check for path in files for check in replay(path, roots, target)]
    width = max((len(c.name) for c in checks), default=0)
    for check in checks:
        print(format_check(check, width))
    counts = {
        "ok": sum(c.ok for c in checks),
        "FAIL": sum(not c.ok and not c.skip for c in checks),
        "SKIP": sum(bool(c.skip) for c in checks),
    }
    print("  ".join(f"{count} {name}" for name, count in counts.items()))
    if args.json:
        args.json.write_text(json.dumps(report(checks, counts, target), indent=1) + "\n")
    return 1 if counts["FAIL"] else 0 if checks else 2


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=KINDS)
    parser.add_argument("--networks", action="store_true", help="only files with a network")
    parser.add_argument("--json", type=Path, help="write the comparisons to this file, too")
    return parser.parse_args(arguments)


def golden_files(roots: list[Path]) -> list[Path]:
    """Returns the golden files below the roots (a root may be a file), sorted."""
    found = {p for r in roots for p in ([r] if r.is_file() else r.rglob("*"))}
    return sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())


def replay(path: Path, roots: list[Path], target: Target = CPU) -> list[Check]:
    """Returns the checks of one file; a replay that breaks is a failed check.

    Args:
        path: of the file.
        roots: where other files of the set are looked for.
        target: where and how networks run.
    """
    try:
        return replay_on(path, roots, target)
    except Exception as error:  # noqa: BLE001  one broken replay must not hide the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return [Check(f"{path.stem}: {reason}"[:200], float("inf"), 0.0)]


def replay_on(path: Path, roots: list[Path], target: Target) -> list[Check]:
    """Returns the checks of the first replay that knows the file."""
    golden = Golden(path, roots)
    placed = golden if target.reference else Golden(path, roots, target)
    for candidate in REPLAYS:
        part = NETWORKS.get(candidate)
        checks = candidate(golden if part is None else placed)
        if checks is not None:
            return checks if part is None else target.judged(checks, part)
    return [Check(path.name, float("nan"), 0.0, skip="no replay for this kind of file")]


def has_network(path: Path, roots: list[Path]) -> bool:
    """Returns whether a file holds the weights or the outputs of a network; by its replay."""
    if path.suffix != ".safetensors":
        return False
    keys = Golden(path, roots).keys
    return (
        any(key.startswith("weights.") for key in keys)
        or "mid.counter" in keys
        or any(key.startswith("out.wrapper_") for key in keys)
    )


def report(checks: list[Check], counts: dict[str, int], target: Target) -> dict[str, object]:
    """Returns the comparisons as JSON has them."""
    worst = max((c for c in checks if not c.skip), key=lambda c: c.rel_err, default=None)
    rows = [
        {"name": c.name, "rel_err": c.rel_err if math.isfinite(c.rel_err) else None,
         "tolerance": c.tolerance, "ok": c.ok, "skip": c.skip}
        for c in checks
    ]  # fmt: skip
    return {
        "device": str(target.device),
        "dtype": target.kind,
        "counts": counts,
        "worst": None if worst is None else worst.name,
        "checks": rows,
    }


def format_check(check: Check, width: int) -> str:
    """Returns the line of one comparison."""
    verdict = f"SKIP {check.skip}" if check.skip else "ok" if check.ok else "FAIL"
    return f"{check.name:<{width}}  {check.rel_err:9.2e}  {check.tolerance:9.2e}  {verdict}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
