"""An inspection as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from xicon_infer.weights.inspect import DtypeRow, Inspection, LoraSummary
from xicon_infer.weights.quantized import list_names

_LONGEST = 100
"""Characters of a metadata value that are shown."""

_MOST_METADATA = 24
"""Metadata entries that are shown."""


def format_inspection(found: Inspection) -> str:
    """Returns an inspection as lines of text; the last line says whether the file can be used."""
    files = f" in {found.files} files" if found.files > 1 else ""
    lines = [
        f"{found.path}",
        f"format      {found.format}{files}, {_size(found.bytes)}",
        f"model       {found.description}",
        f"parameters  {found.parameters:,} in {found.tensors:,} tensors",
    ]
    if found.detected is not None:
        prefix = f", prefix {found.detected.prefix}" if found.detected.prefix else ""
        lines.append(f"naming      {found.detected.naming}{prefix}")
        sizes = ", ".join(f"{name} {size}" for name, size in found.detected.dims.items())
        lines += [f"sizes       {sizes}"] if sizes else []
    lines += [f"quantised   {scheme}" for scheme in found.quantization or ("no",)]
    lines += [f"tokenizer   {found.tokenizer}"] if found.tokenizer else []
    lines += _lora_lines(found.lora) if found.lora is not None else []
    lines += ["", *_table(found.dtypes)]
    lines += _metadata_lines(found.metadata)
    return "\n".join([*lines, "", *_verdict(found)])


def _size(count: int) -> str:
    unit = next((u for u in ("GB", "MB", "kB") if count >= _UNITS[u]), "")
    return f"{count / _UNITS[unit]:.2f} {unit} ({count:,} bytes)" if unit else f"{count:,} bytes"


_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


def _table(rows: tuple[DtypeRow, ...]) -> list[str]:
    cells = [("dtype", "tensors", "numbers", "bytes")]
    cells += [
        (row.name, f"{row.tensors:,}", f"{row.parameters:,}", f"{row.bytes:,}") for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _lora_lines(lora: LoraSummary) -> list[str]:
    ranks = ", ".join(f"{count} pairs of rank {rank}" for rank, count in lora.ranks.items())
    targets = ", ".join(f"{name} x {count}" for name, count in lora.targets.items())
    rest = ", ".join(f"{count} x {kind}" for kind, count in lora.differences.items())
    factors = ", ".join(f"{factor:g} ({count} x)" for factor, count in lora.factors.items())
    blocks = "1 block" if lora.blocks == 1 else f"{lora.blocks} blocks"
    lines = [f"pairs       {ranks or 'none'}, in {blocks}"]
    lines += [f"targets     {targets}"] if targets else []
    lines += [f"whole       {rest}"] if rest else []
    return [*lines, f"factors     {factors}"] if factors else lines


def _metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    if not metadata:
        return []
    shown = list(metadata.items())[:_MOST_METADATA]
    lines = ["", "metadata"]
    lines += [f"  {key} = {_cut(' '.join(value.split()))}" for key, value in shown]
    more = len(metadata) - len(shown)
    return [*lines, f"  and {more} more"] if more else lines


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _verdict(found: Inspection) -> list[str]:
    lines = [f"problem     {problem}" for problem in found.problems]
    for label, names in (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        ("wrong shape", found.misshaped),
    ):
        if names is not None:
            lines.append(f"{label:<11} {len(names)}{': ' if names else ''}{list_names(names)}")
    return [*lines, "usable      " + ("yes" if found.usable else "no")]
