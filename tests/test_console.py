"""Progress in plain lines and on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from xicon_infer.console import ConsoleProgress
from xicon_infer.types import Progress


def plain() -> tuple[ConsoleProgress, io.StringIO]:
    out = io.StringIO()
    return ConsoleProgress(Console(file=out, highlight=False, soft_wrap=True)), out


def test_is_a_progress() -> None:
    progress: Progress = plain()[0]
    with progress.stage("a"):
        progress.step(1, 1)


def test_one_line_per_stage_with_seconds() -> None:
    progress, out = plain()
    with progress.stage("encode text"):
        pass
    assert re.fullmatch(r"encode text +0\.\d s\n", out.getvalue())


def test_nested_stages_are_indented_and_end_first() -> None:
    progress, out = plain()
    with progress.stage("outer"), progress.stage("inner"):
        pass
    inner, outer = out.getvalue().splitlines()
    assert inner.startswith("  inner ")
    assert outer.startswith("outer ")


def test_plain_steps_are_at_most_ten_lines_with_the_time_left() -> None:
    progress, out = plain()
    with progress.stage("sample"):
        for done in range(1, 101):
            progress.step(done, 100)
    lines = out.getvalue().splitlines()
    assert len(lines) == 11
    assert re.fullmatch(r"  sample: 10/100 steps, \d+\.\d s left", lines[0])
    assert lines[9].startswith("  sample: 100/100 steps, 0.0 s left")


def test_unit_of_the_steps() -> None:
    progress, out = plain()
    with progress.stage("decode video"):
        progress.step(4, 4, "frame")
    assert "4/4 frames" in out.getvalue()


def test_a_warning_is_shown_once_and_verbatim() -> None:
    progress, out = plain()
    progress.warn("size [bold]500[/bold] :smile:")
    progress.warn("size [bold]500[/bold] :smile:")
    assert out.getvalue() == "warning: size [bold]500[/bold] :smile:\n"


def test_a_failed_stage_gets_no_line_and_the_error_passes() -> None:
    progress, out = plain()
    with pytest.raises(KeyboardInterrupt), progress.stage("sample"):
        raise KeyboardInterrupt
    assert out.getvalue() == ""
    with progress.stage("next"):
        pass
    assert out.getvalue().startswith("next ")


def test_a_bar_on_a_terminal_disappears_when_the_stage_ends() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    progress = ConsoleProgress(console)
    with progress.stage("sample"):
        progress.step(1, 2)
        progress.step(2, 2)
        assert progress._bar.live.is_started
    assert not progress._bar.live.is_started
    text = out.getvalue()
    assert "━" in text
    assert "1/2" in text or "2/2" in text
    assert re.search(r"sample +0\.\d s\n$", text)


def test_steps_outside_a_stage_are_allowed() -> None:
    progress, out = plain()
    progress.step(1, 1)
    assert "1/1 steps" in out.getvalue()
