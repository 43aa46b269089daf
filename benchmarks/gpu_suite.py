"""Runs every benchmark that needs a GPU, in order of value, within one time budget.

Each part has at most its own seconds and what is left of the whole; what does not fit, and what
needs a package that is not here, is skipped with a sentence, and the rest goes on. A dry run only
asks whether everything runs: there the whole is the one limit. Writes three files, anew after each
part: `gpu_suite.json` (every result file of every part), `gpu_suite.md`
(the figures as tables) and `gpu_suite.log` (what the parts printed).

    python -m benchmarks.gpu_suite --out /tmp/suite
    python -m benchmarks.gpu_suite --out /tmp/suite --parts dit_lengths dit_whole
    python -m benchmarks.gpu_suite --list
    python -m benchmarks.gpu_suite --dry --out /tmp/suite
    python -m benchmarks.gpu_suite --unpack /tmp/suite/gpu_suite.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import torch

from benchmarks.gpu_suite_parts import PARTS, Part
from benchmarks.gpu_suite_summary import summary
from benchmarks.machine import RESULTS, ROOT, environment, write

LEAST_SECONDS = 10.0
"""A part is not begun with less."""

ENVIRONMENT = ("command", "commit", "machine", "versions")


def main() -> None:
    """Runs what the command line asks for."""
    args = parse()
    if args.list:
        for part in chosen(args):
            print(f"{part.name:<12} {part.seconds:4g} s  {shlex.join(words_of(part, args))}")
        return
    if args.unpack is not None:
        for path in unpack(args.unpack, args.into):
            print(path)
        return
    if not args.dry and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_suite needs a CUDA device; --dry runs small forms on a CPU")
    run_all(args)
    print((args.out / "gpu_suite.md").read_text(encoding="utf-8"))


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder to write to")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for everything")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--commit", help="of this tree, where git cannot tell")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    parser.add_argument("--dry", action="store_true", help="small forms, on the CPU")
    parser.add_argument("--unpack", type=Path, help="a gpu_suite.json: write its result files")
    parser.add_argument("--into", type=Path, default=RESULTS, help="where --unpack writes")
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> list[Part]:
    """Returns the parts to run, in their order; the rates come first for all that compare."""
    if args.parts is None:
        return list(PARTS)
    wanted = set(args.parts)
    if any(name.startswith("dit") for name in wanted):
        wanted.add("ceilings")
    return [part for part in PARTS if part.name in wanted]


def words_of(part: Part, args: argparse.Namespace, work: str = "WORK") -> list[str]:
    """Returns the command of a part."""
    text = part.dry if args.dry and part.dry else part.command
    tests = " ".join(gpu_tests()) if "{tests}" in text else ""
    return ["python", "-m", *shlex.split(text.format(work=work, tests=tests))]


def gpu_tests() -> list[str]:
    """Returns the test files that have tests for a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the parts; writes what there is after each. Returns the report."""
    ends = time.monotonic() + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.dry else "cuda"
    report = environment("benchmarks.gpu_suite", device) | {"budget_s": args.budget, "parts": {}}
    report["commit"] = args.commit or report["commit"]
    with (
        TemporaryDirectory() as work,
        (args.out / "gpu_suite.log").open("w", encoding="utf-8") as log,
    ):
        for part in chosen(args):
            before = results_here()
            result = run_part(part, args, work, ends - time.monotonic(), log)
            made = [*copied(before, Path(work), args), *Path(work).glob("*.json")]
            known = {name for done in report["parts"].values() for name in done["files"]}
            result["files"] = {
                path.name: completed(content, report)
                for path in made
                if path.name not in known and (content := read_result(path)) is not None
            }
            report["parts"][part.name] = result
            write(report, args.out / "gpu_suite.json")
            (args.out / "gpu_suite.md").write_text(summary(report), encoding="utf-8")
    return report


def read_result(path: Path) -> dict[str, Any] | None:
    """Returns a result; None for half of one, which a part leaves that was stopped."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def completed(content: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Returns a result that says where it was made; the suite's own words where it says nothing."""
    return {name: report[name] for name in ENVIRONMENT if name not in content} | content


def run_part(
    part: Part, args: argparse.Namespace, work: str, left: float, log: TextIO
) -> dict[str, Any]:
    """Runs one part; returns its command, seconds, and what became of it in a sentence.

    Args:
        part: what to run.
        args: the command line.
        work: folder for its results.
        left: seconds of the whole budget that are left.
        log: gets all that it prints.
    """
    words = words_of(part, args, work)
    result: dict[str, Any] = {
        "command": shlex.join(words).replace(work, "WORK"),
        "status": "skipped",
        "seconds": 0.0,
    }
    if reason := why_skip(part, args, left):
        return result | {"says": reason}
    limit = left if args.dry else min(part.seconds, left)
    log.write(f"\n== {part.name}: {result['command']}\n")
    log.flush()
    start, mark = time.monotonic(), log.tell()
    process = subprocess.Popen(
        [sys.executable, *words[1:]],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code: int | None = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        # Also processes that it started: they would hold the card.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result["seconds"] = round(time.monotonic() - start, 1)
    if code is None:
        return result | {"status": "stopped", "says": f"not done after {limit:.0f} s"}
    last = last_line(Path(log.name), mark)
    return result | {"status": "done" if code == 0 else "failed", "says": last}


def why_skip(part: Part, args: argparse.Namespace, left: float) -> str:
    """Returns why a part is not begun, "" if it is."""
    if args.dry and part.dry is None:
        return f"not in a dry run: {part.why_not_dry}"
    script = part.command.split()[0]
    if script.startswith("benchmarks.") and find_spec(script) is None:
        return f"{script} is not there"
    missing = [name for name in part.needs if find_spec(name) is None]
    if missing:
        return f"needs packages that are not installed: {', '.join(missing)}"
    if left < LEAST_SECONDS:
        return f"the budget of {args.budget:g} s was used up"
    return ""


def last_line(path: Path, start: int) -> str:
    """Returns the last line that a part printed."""
    with path.open(encoding="utf-8", errors="replace") as log:
        log.seek(start)
        lines = [line.strip() for line in log if line.strip()]
    return lines[-1][:300] if lines else ""


def results_here() -> dict[Path, int]:
    """Returns the results in the repository, with the time of their last change."""
    return {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.json")}


def copied(before: dict[Path, int], work: Path, args: argparse.Namespace) -> list[Path]:
    """Copies results that a part wrote into the repository to the others; returns the copies.

    For scripts whose output folder cannot be chosen. A dry run begins none of them.
    """
    if args.dry:
        return []
    new = [path for path, changed in results_here().items() if before.get(path) != changed]
    return [Path(shutil.copy(path, work)) for path in new]


def unpack(packed: Path, folder: Path) -> list[Path]:
    """Writes the result files of a suite one by one; returns their paths.

    A file that knows no commit gets that of the suite.
    """
    report = json.loads(packed.read_text(encoding="utf-8"))
    written = []
    for part in report["parts"].values():
        for name, content in part["files"].items():
            if content.get("commit") == "none":
                content["commit"] = report["commit"]
            written.append(write(content, folder / name))
    return written


if __name__ == "__main__":
    main()
