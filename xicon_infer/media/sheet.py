"""Contact sheets: several clips in one picture, aligned in time, for a look at a whole result.

Columns are equal steps of relative time, so one column shows the same moment of the driving
video, the pose and the result even where their numbers of frames differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xicon_infer.errors import InvalidRequest
from xicon_infer.media.write import write_png
from xicon_infer.types import UInt8Array

Row = tuple[str, UInt8Array]
"""A label, and frames uint8 [F, H, W, 3]; a still picture [H, W, 3] is shown once."""

_BACKGROUND = (22, 22, 24)
_RULE = (52, 52, 56)
_BRIGHT = (236, 236, 238)
_DIM = (150, 150, 156)

_MARGIN = 28
_GAP = 10
_ROW_GAP = 26
_LABEL_SIZE = 18
_NOTE_SIZE = 13
_CAPTION = 30
"""Height of the line above a row, from its text to the pictures."""
_FOOTER = 22
"""Height of the line below a row, with frame numbers and times."""
_MAX_ASPECT = 1.25
"""A column is never wider than this times the cell height; rows of wide pictures are lower."""
_MIN_WIDTH = 96
"""Room for a frame number and a time below a cell."""


def contact_sheet(
    rows: Sequence[Row],
    *,
    columns: int = 8,
    cell_height: int = 200,
    fps: Fraction | None = None,
    numbers: Sequence[int] | None = None,
) -> UInt8Array:
    """Returns one picture that shows each row's clip at equal steps of time.

    Args:
        rows: label and frames of each row, top to bottom.
        columns: moments to show; less are shown if no row has so many frames.
        cell_height: height of a picture on the sheet, in pixels.
        fps: frames per second, for the times; None leaves them out.
        numbers: of the frames given, where they were taken from longer clips; None counts them.

    Returns:
        uint8 [H, W, 3].

    Raises:
        InvalidRequest: there are no rows or frames, or a number is too small.
    """
    clips = [
        (" ".join(label.split()), frames if frames.ndim == 4 else frames[None])
        for label, frames in rows
    ]
    _check(clips, columns, cell_height)
    columns = min(columns, max(len(frames) for _, frames in clips))
    column_width = _column_width(clips, cell_height)
    lines = _layout(clips, column_width, cell_height)
    label_width = max(_label_width(line) for line in lines)
    inner = max(columns * (column_width + _GAP) - _GAP, label_width)
    size = inner + 2 * _MARGIN, lines[-1].bottom + _MARGIN
    sheet = Image.new("RGB", size, _BACKGROUND)
    for line in lines:
        _draw_caption(sheet, line)
        for column, index in enumerate(moments(len(line.frames), columns)):
            left = _MARGIN + column * (column_width + _GAP)
            width = column_width if len(line.frames) > 1 else _still_width(line, inner)
            box = (left, line.top + _CAPTION, width, line.height)
            _draw_cell(sheet, line.frames[index], box)
            if len(line.frames) > 1:
                number = numbers[index] if numbers and index < len(numbers) else index
                _draw_footer(sheet, number, fps, box)
    return np.array(sheet)


def save_contact_sheet(
    path: Path | str,
    rows: Sequence[Row],
    *,
    columns: int = 8,
    cell_height: int = 200,
    fps: Fraction | None = None,
    numbers: Sequence[int] | None = None,
    field: str = "output",
) -> None:
    """Writes `contact_sheet` as PNG.

    Raises:
        MediaError: DISK_FULL or MEDIA_WRITE.
        InvalidRequest: as `contact_sheet`.
    """
    sheet = contact_sheet(rows, columns=columns, cell_height=cell_height, fps=fps, numbers=numbers)
    write_png(path, sheet, field=field)


def moments(num_frames: int, columns: int) -> list[int]:
    """Returns the frame index for each column, first to last; one still gives one index."""
    if num_frames == 1 or columns == 1:
        return [0]
    return [round(column * (num_frames - 1) / (columns - 1)) for column in range(columns)]


@dataclass(frozen=True)
class _Line:
    """One row on the sheet: from `top`, its pictures `height` pixels high."""

    label: str
    frames: UInt8Array
    top: int
    height: int

    @property
    def bottom(self) -> int:
        """Returns where the row ends; a still has no line of numbers."""
        return self.top + _CAPTION + self.height + (_FOOTER if len(self.frames) > 1 else 0)


def _check(clips: Sequence[Row], columns: int, cell_height: int) -> None:
    if not clips or any(frames.size == 0 for _, frames in clips):
        raise InvalidRequest("'rows' of a contact sheet must each have a frame", field="rows")
    if columns < 1 or cell_height < 16:
        raise InvalidRequest(
            "a contact sheet needs 1 column and cells 16 pixels high, or more; got "
            f"{columns} and {cell_height}",
            field="columns" if columns < 1 else "cell_height",
        )


def _column_width(clips: Sequence[Row], cell_height: int) -> int:
    """Returns the width of the widest clip's pictures; stills may stand over."""
    moving = [frames for _, frames in clips if len(frames) > 1] or [clips[0][1]]
    aspect = max(frames.shape[2] / frames.shape[1] for frames in moving)
    return max(_MIN_WIDTH, round(cell_height * min(aspect, _MAX_ASPECT)))


def _still_width(line: _Line, inner: int) -> int:
    """Returns the width of a still picture; it has its row for itself."""
    _, height, width, _ = line.frames.shape
    return min(inner, max(1, round(line.height * width / height)))


def _layout(clips: Sequence[Row], column_width: int, cell_height: int) -> list[_Line]:
    lines: list[_Line] = []
    for label, frames in clips:
        top = lines[-1].bottom + _ROW_GAP if lines else _MARGIN
        height = cell_height
        if len(frames) > 1:
            height = min(cell_height, round(column_width * frames.shape[1] / frames.shape[2]))
        lines.append(_Line(label, frames, top, max(height, 1)))
    return lines


def _draw_caption(sheet: Image.Image, line: _Line) -> None:
    draw = ImageDraw.Draw(sheet)
    if line.top > _MARGIN:
        rule = line.top - _ROW_GAP // 2
        draw.line([(_MARGIN, rule), (sheet.width - _MARGIN, rule)], fill=_RULE)
    font = _font(_LABEL_SIZE)
    base = line.top + _LABEL_SIZE
    draw.text((_MARGIN, base), line.label, font=font, fill=_BRIGHT, anchor="ls")
    after = _MARGIN + draw.textlength(line.label, font=font) + 12
    draw.text((after, base), _facts(line.frames), font=_font(_NOTE_SIZE), fill=_DIM, anchor="ls")


def _draw_cell(sheet: Image.Image, frame: UInt8Array, box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    ratio = min(width / frame.shape[1], height / frame.shape[0])
    size = max(1, round(frame.shape[1] * ratio)), max(1, round(frame.shape[0] * ratio))
    shot = Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.LANCZOS)
    sheet.paste(shot, (left + (width - size[0]) // 2, top + (height - size[1]) // 2))


def _draw_footer(
    sheet: Image.Image, index: int, fps: Fraction | None, cell: tuple[int, int, int, int]
) -> None:
    left, top, width, height = cell
    draw, font = ImageDraw.Draw(sheet), _font(_NOTE_SIZE)
    base = top + height + _FOOTER - 6
    draw.text((left, base), f"#{index}", font=font, fill=_BRIGHT, anchor="ls")
    if fps:
        seconds = f"{float(index / fps):.2f} s"
        draw.text((left + width - 1, base), seconds, font=font, fill=_DIM, anchor="rs")


def _facts(frames: UInt8Array) -> str:
    count, height, width, _ = frames.shape
    return f"{width} x {height}" + (f", {count} frames" if count > 1 else "")


def _label_width(line: _Line) -> int:
    facts = _font(_NOTE_SIZE).getlength(_facts(line.frames))
    return math.ceil(_font(_LABEL_SIZE).getlength(line.label) + 12 + facts)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
