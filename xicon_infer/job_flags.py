"""The flags of the command line, made from the table of options.

Errors of argparse, which prints several lines and ends the process, are raised here like every
other refusal. Values are not checked: `xicon_infer.job.make_job` does that.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job, make_job, outputs_for
from xicon_infer.job_fields import EXAMPLES, FIELDS, GROUPS, Field
from xicon_infer.job_values import value_from_text

COMMANDS = ("run", "doctor", "weights", "import-workflow")
GPU_HELP = "with --dry-run: plan the memory for this card, as 'RTX 4090' or '24GB'"
SHELL_FLAGS = {
    "--dry-run": "print the plan and load nothing",
    "--json": "print only JSON on standard output",
    "--quiet": "print nothing but errors",
    "--debug": "show the traceback of an error",
}

_METAVARS = {"path": "PATH", "text": "TEXT", "integer": "N", "number": "X", "loras": "LORA"}
_MOST_NAMES = 5
"""A longer list of choices stands in the help text instead of in braces behind the flag."""


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviations and without defaults, that raises its errors."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises `InvalidRequest`."""
        raise InvalidRequest(f"{message}; see --help", code="INVALID_ARGUMENTS")


def run_parser() -> Parser:
    """Returns the parser of `run`: one flag per option of the table, in groups."""
    from xicon_infer import __version__

    parser = Parser(
        prog="xicon-infer run",
        usage="xicon-infer run [--image PATH] (--video PATH | --track PATH | --pose-video PATH) "
        "[options]",
        description="One reference image and one dance become a video of that character dancing.",
        epilog="examples:\n"
        + "".join(f"  {name}: {command}\n" for name, command in EXAMPLES.items())
        + "\n`xicon-infer doctor` says what this machine can run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for group, sentence in GROUPS.items():
        section = parser.add_argument_group(group, sentence)
        for option in FIELDS:
            if option.group == group:
                section.add_argument(*option.flags, **_argument(option))
    shell = parser.add_argument_group("shell", "What is printed.")
    for flag, text in SHELL_FLAGS.items():
        shell.add_argument(flag, action="store_true", help=text)
    shell.add_argument("--gpu", metavar="NAME", help=GPU_HELP)
    shell.add_argument("--version", action="version", version=f"xicon-infer {__version__}")
    return parser


def parse(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the options that were given.

    Raises:
        InvalidRequest: an unknown option or word, or a missing value.
    """
    namespace, rest = parser.parse_known_args(words)
    for word in rest:
        if not word.startswith("-"):
            raise InvalidRequest(
                f"unexpected word {word!r}: the commands are {', '.join(COMMANDS)}, "
                "everything else is an option",
                code="INVALID_ARGUMENTS",
            )
        near = difflib.get_close_matches(word.partition("=")[0], _flags(parser), n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise InvalidRequest(f"unknown option {word}; {hint}", code="UNKNOWN_FIELD")
    return vars(namespace)


def jobs_of(options: Mapping[str, Any], draw: Callable[[int], int] | None = None) -> list[Job]:
    """Returns the jobs of a command: one, or one for each of several references.

    Args:
        options: as `parse` gives them.
        draw: makes a seed of -1 for several references, which share it so that only the character
            differs; None leaves it to each job.

    Raises:
        InvalidRequest: a value is wrong.
    """
    table = {option.name: option for option in FIELDS}
    values = {
        name: value_from_text(table[name], value) if isinstance(value, str) else value
        for name, value in options.items()
        if name in table and name != "image"
    }
    images = options.get("image", [])
    if len(images) < 2:
        return [make_job(values | ({"image": images[0]} if images else {}))]
    first = make_job(values | {"image": images[0]})
    if draw is not None and table["seed"].used_by(first.pipeline):
        values["seed"] = draw(first.seed)
    paths = outputs_for(first.output, [Path(image) for image in images])
    return [
        make_job(values | {"image": image, "output": str(path)})
        for image, path in zip(images, paths, strict=True)
    ]


def _flags(parser: Parser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _argument(option: Field) -> dict[str, Any]:
    """Returns what argparse has to know of an option; values are checked by `make_job`."""
    text = option.help.replace("%", "%%") + option.users_text
    default = f" (default: {option.default_text})" if option.default_text else ""
    if option.kind == "switch":
        action = argparse.BooleanOptionalAction
        return {"dest": option.name, "action": action, "help": text + default}
    metavar = _METAVARS.get(option.kind, "NAME")
    if option.choices:
        names = [str(choice) for choice in option.choices]
        few = len(names) <= _MOST_NAMES
        metavar = "{" + ",".join(names) + "}" if few else "NAME"
        text += "" if few else ": " + ", ".join(names)
    if option.kind != "text" or option.pattern:  # a default prompt is too long to show
        text += default
    store = "append" if option.kind == "loras" else "store"
    several = {"nargs": "+"} if option.name == "image" else {}
    store = "extend" if several else store
    return {"dest": option.name, "action": store, "metavar": metavar, "help": text, **several}
