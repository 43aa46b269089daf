"""The owner's own judge of content: a function of theirs, asked before the fetch and after.

    def judge(stage: str, request: dict, video: Path | None) -> str | None

`stage` is "request" (before anything is fetched; `video` is None) or "result" (`video` is the
finished file). It returns None or "" to go on, or a reason, with which the job is refused. What it
raises ends the job as well: without a judgement nothing goes out.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from xicon_infer.errors import InvalidRequest

Judge: TypeAlias = "Callable[[str, dict[str, Any], Path | None], str | None]"


def load_judge(name: str) -> Judge | None:
    """Returns the function that `module:function` names; None for "".

    Raises:
        InvalidRequest: there is no such function.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    problem = "it must be `module:function`"
    if module and function:
        try:
            found = getattr(import_module(module), function, None)
        except ImportError as error:
            found, problem = None, f"the module cannot be imported ({error})"
        else:
            problem = f"module {module} has no function {function}"
        if callable(found):
            return found
    raise InvalidRequest(
        f"'XICON_MODERATION': {name!r} cannot be used: {problem}", field="XICON_MODERATION"
    )


def ask(judge: Judge | None, stage: str, request: dict[str, Any], video: Path | None) -> None:
    """Lets a job go on, or refuses it.

    Args:
        judge: the owner's function, None for none.
        stage: "request" or "result".
        request: resolved fields; a copy, so that the judge changes nothing.
        video: the finished file, or None.

    Raises:
        InvalidRequest: CONTENT_REJECTED with the judge's reason.
    """
    reason = judge(stage, request, video) if judge else None
    if reason:
        raise InvalidRequest(
            f"The {stage} was refused: {reason}", field=None, code="CONTENT_REJECTED"
        )
