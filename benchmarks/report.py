"""Writes the tables and plots of benchmarks/README.md from the results.

Between its marks the page says which figures are owed and which are met, and what each result
holds; everything else on it stays. Running it twice changes nothing. A result that does not say
on which machine, with which versions and at which commit it was made is refused by name. Plots
are SVG files beside the results.

    python -m benchmarks.report
    python -m benchmarks.report --check
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite_summary import PAGES, table
from benchmarks.machine import RESULTS, ROOT
from benchmarks.report_figures import FIGURES, Results, state_of, value_of
from benchmarks.report_svg import bars

PAGE = ROOT / "benchmarks" / "README.md"
REQUIRED = ("machine", "versions", "commit")
ON_THE_CPU = "cpu"


class Incomplete(ValueError):
    """A result does not say where it was made."""


def main() -> None:
    """Writes the page and the plots; with --check only says whether they are up to date."""
    args = parse()
    files = rendered(read_results(args.results), args.page)
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    if args.check:
        for path in stale:
            print(f"{path.name} is not up to date: run python -m benchmarks.report")
        sys.exit(1 if stale else 0)
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
        print(f"written: {path.name}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the marks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    return parser.parse_args()


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the results of a folder by file name.

    Raises:
        Incomplete: one has no machine, versions or commit; all such are named.
    """
    results = {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    faults = [
        f"{name} has no {' and no '.join(missing)}"
        for name, content in results.items()
        if (missing := [key for key in REQUIRED if not content.get(key)])
    ]
    if faults:
        raise Incomplete("; ".join(faults) + ". Run its benchmark again, on a known machine")
    return results


def rendered(results: Results, page: Path) -> dict[Path, str]:
    """Returns the text of the page and of each plot, by path."""
    text = page.read_text(encoding="utf-8")
    text = replaced(text, "owed", owed_lines(results), page)
    text = replaced(text, "results", result_lines(results), page)
    folder = page.parent / "results"
    return {page: text} | {folder / name: svg for name, svg in plots(results).items()}


def replaced(text: str, name: str, lines: list[str], page: Path) -> str:
    """Returns a page with other lines between the marks of a name.

    Raises:
        ValueError: the marks are not there.
    """
    start, end = f"<!-- report: {name} -->\n", f"<!-- end: {name} -->\n"
    before, first, rest = text.partition(start)
    _, second, after = rest.partition(end)
    if not first or not second:
        raise ValueError(f"{page.name} needs the lines {start.strip()} and {end.strip()}")
    return before + start + "\n".join(["", *lines, "", ""]) + end + after


def owed_lines(results: Results) -> list[str]:
    """Returns the figures with their targets and states."""
    rows = []
    for figure in FIGURES:
        value, name = value_of(figure, results)
        source = f"[{name}](results/{name})" if name else f"`--parts {figure.part}`"
        rows.append((
            figure.what, figure.unit or None, figure.must, figure.good, figure.ambitious, value,
            state_of(figure, value), source,
        ))  # fmt: skip
    owed = sum(row[6] == "owed" for row in rows)
    head = ("figure", "unit", "must", "good", "ambitious", "measured", "state", "from")
    return [f"{owed} of {len(rows)} figures are owed.", "", *table(head, rows)]


def result_lines(results: Results) -> list[str]:
    """Returns a list of the results, and the tables of those that were made on a GPU.

    The command of each stands in its file.
    """
    head = ("result", "machine", "commit")
    rows = [
        (f"[{name}](results/{name})", machine_of(content), str(content["commit"])[:10])
        for name, content in results.items()
    ]
    lines = table(head, rows)
    drawn = set(plots(results))
    for name, content in results.items():
        if machine_of(content).startswith(ON_THE_CPU) or "_cpu" in name:
            continue
        for start, make in PAGES:
            if name.startswith(start):
                lines += ["", f"### {name.removesuffix('.json')}", "", *make(content)]
        plot = name.replace(".json", ".svg")
        if plot in drawn:
            lines += ["", f"![{name.removesuffix('.json')}](results/{plot})"]
    return lines


def machine_of(content: dict[str, Any]) -> str:
    """Returns the machine of a result in a few words."""
    machine = content["machine"]
    if isinstance(machine, str):
        return machine
    device = machine.get("device", "")
    return f"{device} ({machine['cpu']})" if "cpu" in machine else str(device)


def plots(results: Results) -> dict[str, str]:
    """Returns the plots of passes and jobs on a GPU, by file name."""
    found = {}
    for name, content in results.items():
        if "_cuda" not in name:
            continue
        target = name.replace(".json", ".svg")
        if name.startswith("dit_"):
            rows = [
                (f"{candidate}, {tokens} tokens", each["median_s"])
                for tokens, candidates in content["results"].items()
                for candidate, each in candidates.items()
            ]
            title = "seconds of a forward pass"
        elif name.startswith("job_") and "stages" in content:
            rows = [(stage, each["seconds"]) for stage, each in content["stages"].items()]
            title = f"seconds of a warm job, {content['shape']['pipeline']}"
        else:
            continue
        if rows:
            found[target] = bars(title, rows, "s")
    return found


if __name__ == "__main__":
    main()
