"""`python -m tests.parity DIR...`: replays every golden file below the folders.

Prints one line per comparison, `name  rel_err  tolerance  ok|FAIL|SKIP reason`, and a count.
Exits with 1 if anything fails, with 2 if there is nothing to replay. READMEs and pictures are
passed over. A file of a kind that nothing here can replay is a SKIP: it counts as missing.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

from tests.parity.golden import Check, Golden
from tests.parity.replays import REPLAYS

KINDS = {".safetensors", ".json", ".npz"}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    roots = [Path(a) for a in arguments]
    missing = [str(r) for r in roots if not r.exists()]
    if not roots or missing:
        print(f"usage: python -m tests.parity DIR...  (not found: {', '.join(missing) or '-'})")
        return 2
    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
    torch.manual_seed(0)
    checks = [check for path in golden_files(roots) for check in replay(path, roots)]
    width = max((len(c.name) for c in checks), default=0)
    for check in checks:
        print(format_check(check, width))
    counts = {
        "ok": sum(c.ok for c in checks),
        "FAIL": sum(not c.ok and not c.skip for c in checks),
        "SKIP": sum(bool(c.skip) for c in checks),
    }
    print("  ".join(f"{count} {name}" for name, count in counts.items()))
    return 1 if counts["FAIL"] else 0 if checks else 2


def golden_files(roots: list[Path]) -> list[Path]:
    """Returns the golden files below the roots (a root may be a file), sorted."""
    found = {p for r in roots for p in ([r] if r.is_file() else r.rglob("*"))}
    return sorted(p for p in found if p.suffix in KINDS and p.is_file())


def replay(path: Path, roots: list[Path]) -> list[Check]:
    """Returns the checks of one file; a replay that breaks is a failed check."""
    try:
        golden = Golden(path, roots)
        for candidate in REPLAYS:
            checks = candidate(golden)
            if checks is not None:
                return checks
    except Exception as error:  # noqa: BLE001  one broken replay must not hide the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return [Check(f"{path.stem}: {reason}"[:200], float("inf"), 0.0)]
    return [Check(path.name, float("nan"), 0.0, skip="no replay for this kind of file")]


def format_check(check: Check, width: int) -> str:
    """Returns the line of one comparison."""
    verdict = f"SKIP {check.skip}" if check.skip else "ok" if check.ok else "FAIL"
    return f"{check.name:<{width}}  {check.rel_err:9.2e}  {check.tolerance:9.2e}  {verdict}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
