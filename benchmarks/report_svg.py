"""Bar charts as SVG, without a library: one row a bar, its label in front and its number behind."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

ROW, LEFT, WIDTH, RIGHT, TOP = 26, 230, 420, 110, 40
BAR, MARK = "#3b6ea5", "#c0392b"


def bars(
    title: str, rows: Sequence[tuple[str, float]], unit: str, *, mark: float | None = None
) -> str:
    """Returns a chart.

    Args:
        title: above it.
        rows: label and value, not negative; at least one.
        unit: behind every number.
        mark: value at which a line stands, as a target.
    """
    greatest = max([value for _, value in rows] + [mark or 0.0]) or 1.0
    height = TOP + ROW * len(rows) + 14
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" '
        f'height="{height}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="15">{escape(title)}</text>',
    ]
    for number, (label, value) in enumerate(rows):
        top = TOP + ROW * number
        length = WIDTH * value / greatest
        lines += [
            f'<text x="{LEFT - 8}" y="{top + 16}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LEFT}" y="{top + 3}" width="{length:.1f}" height="{ROW - 8}" '
            f'fill="{BAR}"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{top + 16}">{value:.4g} {escape(unit)}</text>',
        ]
    if mark is not None:
        x = LEFT + WIDTH * mark / greatest
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - 8}" stroke="{MARK}" '
            'stroke-dasharray="4 3"/>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"
