"""Progress on the terminal: a line per stage, a bar with the time left while steps are counted.

Everything goes to standard error, so that standard output holds the result alone. Where standard
error is no terminal (a log file, a pipe) the same is told in plain lines, at most ten per stage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

_PLAIN_LINES = 10
_SHORT_S = 60.0


class ConsoleProgress:
    """A `xicon_infer.types.Progress` that shows stages, steps and warnings.

    Args:
        console: where to write; standard error if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._stack: list[_Running] = []
        self._warned: set[str] = set()
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}, {task.fields[left]}"),
            console=self._console,
            transient=True,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows the name and the seconds of what runs inside, once it is done."""
        running = _Running(name)
        self._stack.append(running)
        try:
            yield
        finally:
            self._stack.pop()
            self._end_bar(running)
        indent = "  " * len(self._stack)
        self._line(f"{indent}{name:<{28 - len(indent)}} {_seconds(running.elapsed):>8}")

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Moves the bar of the current stage, or writes a plain line every tenth of the way."""
        if unit == "window":  # a part of a step, whose bar is shown
            return
        running = self._stack[-1] if self._stack else _Running("")
        left = f"{_seconds(running.left(done, total))} left"
        if self._console.is_terminal:
            shown: dict[str, Any] = {
                "total": total,
                "completed": done,
                "unit": _plural(unit),
                "left": left,
            }
            if running.task is None:
                running.task = self._bar.add_task(running.name, **shown)
                self._bar.start()
            self._bar.update(running.task, **shown)
            return
        tenth = done * _PLAIN_LINES // max(total, 1)
        if tenth > running.tenth:
            running.tenth = tenth
            self._line(f"  {running.name}: {done}/{total} {_plural(unit)}, {left}")

    def warn(self, message: str) -> None:
        """Shows a warning, the same one only once."""
        if message not in self._warned:
            self._warned.add(message)
            self._line(f"warning: {message}")

    def _line(self, text: str) -> None:
        # Messages may hold brackets that rich would take for its markup.
        self._console.print(text, markup=False, emoji=False)

    def _end_bar(self, running: _Running) -> None:
        if running.task is None:
            return
        self._bar.remove_task(running.task)
        if not self._bar.task_ids:
            self._bar.stop()


class _Running:
    """One stage that has begun: when, its bar, and how many tenths have been told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.start = time.perf_counter()
        self.task: TaskID | None = None
        self.tenth = 0

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.perf_counter() - self.start

    def left(self, done: int, total: int) -> float:
        """Returns the seconds left if the rest goes on at the same pace."""
        return self.elapsed * (total - done) / max(done, 1)


def _plural(unit: str) -> str:
    # Units of measure have no plural.
    return unit if unit.endswith("s") or unit.isupper() else unit + "s"


def _seconds(value: float) -> str:
    if value < _SHORT_S:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes}:{seconds:02d} min"
