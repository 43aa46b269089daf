"""`xicon-infer import-workflow`: a ComfyUI workflow becomes a request or a command line.

Reads API-format graphs and UI exports. The result goes to standard output, what was left out to
standard error. An error is raised; `xicon_infer.run` reports it.

Exit codes: those of `xicon_infer.run`: 0 done, 2 the graph cannot be translated, 3 the file cannot
be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.job_flags import Parser, parse
from xicon_infer.workflow import Imported, import_report
from xicon_infer.workflow_cli_command import MEDIA, checked_job, command, job_values
from xicon_infer.workflow_graph import cut
from xicon_infer.workflow_ui import convert, is_ui

_MAX_BYTES = 64 * 1024 * 1024
_WRAPPERS = ("input", "workflow", "prompt")
"""Keys under which workers and ComfyUI's own API take a graph."""

_LEFT_OPEN = ("MISSING_FIELD", "DRIVING_VIDEO_REQUIRED")

_DISTILLED = ("distill", "lightx2v")
"""Words in the name of a LoRA that makes few steps enough."""

_EXAMPLES = """examples:
  xicon-infer import-workflow dance.json
  xicon-infer import-workflow dance.json --command --images-dir ComfyUI/input
  xicon-infer import-workflow dance.json --json > request.json
"""


def main(argv: Sequence[str]) -> int:
    """Prints what a workflow means to this project, and returns the exit code.

    Args:
        argv: the words after `xicon-infer import-workflow`.

    Raises:
        InvalidRequest: a wrong option, or a graph that cannot be translated.
        MediaError: the file cannot be read.
    """
    words, files = _split(argv)
    options = parse(_parser(), words)
    if len(files) != 1:
        message = f"import-workflow takes one file, got {len(files)}; see --help"
        raise InvalidRequest(message, code="INVALID_ARGUMENTS")
    warnings: list[str] = []
    imported = _located(_read(Path(files[0]), warnings), options.get("images_dir"), warnings)
    warnings += imported.warnings
    values = job_values(imported, warnings)
    try:
        warnings += checked_job(values).warnings
    except InvalidRequest as error:
        # A template leaves pictures to the request; a command needs them.
        if "command" in options or error.code not in _LEFT_OPEN:
            raise
        warnings.append(error.message)
    if "json" in options:
        text = json.dumps({"input": _request(imported, warnings)}, indent=2, ensure_ascii=False)
    elif "command" in options:
        text = command(values)
    else:
        text = _summary(imported)
    warnings += [f"node {name}: unknown, and not needed" for name in imported.unknown_nodes]
    warnings += [f"{name}: only shows or saves something" for name in imported.ignored]
    sys.stdout.write(_safe(f"{text}\n"))
    for line in dict.fromkeys(warnings):
        sys.stderr.write(_safe(f"warning: {' '.join(line.split())}\n"))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="xicon-infer import-workflow",
        usage="xicon-infer import-workflow FILE [--json | --command] [--images-dir DIR]",
        description="Translates a ComfyUI workflow (API format or UI export) for this project. "
        "Nothing of it is run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the request of a worker")
    form.add_argument("--command", action="store_true", help="print the command line")
    parser.add_argument(
        "--images-dir",
        type=Path,
        metavar="DIR",
        help="folder of the pictures and videos, as ComfyUI/input",
    )
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words of options and the words that are files."""
    options, files = [], []
    takes_value = False
    for word in argv:
        if takes_value or (word.startswith("-") and word != "-"):
            options.append(word)
        else:
            files.append(word)
        takes_value = word == "--images-dir" and not takes_value
    return options, files


def _read(path: Path, warnings: list[str]) -> Imported:
    """Returns what the workflow in a file says.

    Raises:
        MediaError: the file is not there, too large or not readable.
        InvalidRequest: it is no workflow, or not one that can be translated.
    """
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= _MAX_BYTES else b""
    except OSError as error:
        message = f"'{path}': {error.strerror or error}"
        raise MediaError(message, field="workflow", code="MEDIA_NOT_FOUND") from error
    if size > _MAX_BYTES:
        message = f"'{path}' has {size} bytes; a workflow has at most {_MAX_BYTES}"
        raise MediaError(message, field="workflow", code="MEDIA_TOO_LARGE")
    try:
        graph = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        message = f"'{path}' is not JSON: export the workflow in ComfyUI, not a picture of it"
        raise InvalidRequest(message, field="workflow", code="INVALID_JSON") from None
    return read_graph(graph, warnings)


def read_graph(graph: object, warnings: list[str]) -> Imported:
    """Returns what a graph of either format says, also if a request is around it.

    Args:
        graph: as read from JSON.
        warnings: gets those of the conversion.

    Raises:
        InvalidRequest: it cannot be translated.
    """
    for name in _WRAPPERS:
        inside = graph.get(name) if isinstance(graph, Mapping) and not is_ui(graph) else None
        if isinstance(inside, Mapping) and "class_type" not in inside:
            graph = inside
    if isinstance(graph, Mapping) and is_ui(graph):
        graph, told = convert(graph)
        warnings += told
    return import_report(graph)


def _located(imported: Imported, folder: Path | None, warnings: list[str]) -> Imported:
    """Returns the same with the paths of pictures and videos, and warns of missing ones."""
    fields, options = dict(imported.fields), dict(imported.options)
    for values in (fields, options):
        for name in MEDIA:
            value = values.get(name)
            if isinstance(value, str) and "://" not in value and value[:5].lower() != "data:":
                values[name] = _path(value, folder, warnings)
    return replace(imported, fields=fields, options=options)


def _path(name: str, folder: Path | None, warnings: list[str]) -> str:
    plain = name.replace("\\", "/")
    places = [Path(plain)] if folder is None else [folder / plain, folder / Path(plain).name]
    for place in places:
        if _exists(place):
            return str(place)
    where = "here; name its folder with --images-dir" if folder is None else f"in {folder}"
    warnings.append(f"{cut(name)} is not {where}")
    return str(places[0])


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _request(imported: Imported, warnings: list[str]) -> dict[str, Any]:
    """Returns the fields of a request, media as objects.

    Raises:
        InvalidRequest: a request cannot say what the graph says.
    """
    if "end_image" in imported.options:
        message = "a request takes no picture for the end; use --command"
        raise InvalidRequest(message, field="workflow", code="WORKFLOW_UNSUPPORTED")
    fields = dict(imported.fields)
    for name in MEDIA:
        value = fields.get(name)
        if isinstance(value, str):
            kind = "url" if "://" in value else "path"
            fields[name] = {"base64" if value[:5].lower() == "data:" else kind: value}
            if kind == "path":
                message = f"'{name}' is a file here; a worker needs a URL, base64 or a volume path"
                warnings.append(message)
    loras = [str(lora["name"]).lower() for lora in fields.get("loras", ())]
    if "loras" in fields and not any(word in name for name in loras for word in _DISTILLED):
        # The other profile would add the step-distill LoRA.
        fields["profile"] = "quality"
    if fields.get("fps") == "source":
        del fields["fps"]
        warnings.append("'fps' of the video itself is no value of a request: 16 is its default")
    for name, value in sorted(imported.options.items()):
        setting = "; set XICON_PRESET on the worker" if name == "preset" else ""
        warnings.append(
            f"'{name}' {value} is no field of a request; only --command has it{setting}"
        )
    return fields


def _summary(imported: Imported) -> str:
    """Returns one line per field, and the options behind them."""
    fields = dict(imported.fields)
    lines = [f"mode: {fields.pop('mode', '')}"]
    for name, value in (*fields.items(), *imported.options.items()):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{name}: {' '.join(str(text).split())}")
    return "\n".join(lines)


def _safe(text: str) -> str:
    """Returns a text without what a terminal would obey and what it could not print."""
    kept = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return kept.encode("utf-8", "replace").decode()
