"""The report of `doctor` as text, and as a table for a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xicon_infer.doctor_findings import Finding

_COLOURS = {"ok": "green", "absent": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Number:
    """One comparison: `error` must not exceed `tolerance`. skip: why nothing was computed."""

    name: str
    error: float
    tolerance: float
    skip: str = ""

    @property
    def ok(self) -> bool:
        """True if the error is a number within the tolerance."""
        return not self.skip and math.isfinite(self.error) and self.error <= self.tolerance


def format_findings(findings: Sequence[Finding]) -> list[str]:
    """Returns one line per finding under the name of its group."""
    lines = []
    for group, members in itertools.groupby(findings, key=lambda finding: finding.group):
        lines.append(group)
        for finding in members:
            lines.append(f"  {finding.state:<8} {finding.name:<24} {finding.text}".rstrip())
            if finding.fix and finding.state != "ok":
                lines.append(f"  {'':<8} {'':<24} -> {finding.fix}")
    return lines


def format_numbers(numbers: Sequence[Number]) -> list[str]:
    """Returns one line per comparison: name, error, tolerance, verdict."""
    width = max((len(number.name) for number in numbers), default=0)
    return [
        f"{number.name:<{width}}  {'-' if number.skip else f'{number.error:.2e}':>9}  "
        f"{number.tolerance:9.2e}  "
        f"{f'skip: {number.skip}' if number.skip else 'ok' if number.ok else 'FAIL'}"
        for number in numbers
    ]


def show(findings: Sequence[Finding], console: Any = None) -> None:
    """Prints the findings as one table per group.

    Args:
        findings: in the order of their groups.
        console: of rich; standard output if None.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = console or Console()
    for group, members in itertools.groupby(findings, key=lambda finding: finding.group):
        table = Table(title=group, title_justify="left", expand=True, show_header=False)
        table.add_column(width=8)
        table.add_column(ratio=1)
        table.add_column(ratio=4)
        for finding in members:
            text = Text(finding.text)
            if finding.fix and finding.state != "ok":
                text.append(f"\n{finding.fix}", style="cyan")
            state = Text(finding.state, style=_COLOURS[finding.state])
            table.add_row(state, Text(finding.name), text)
        out.print(table)
