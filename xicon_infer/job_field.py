"""What one option is, and how options are written down; the table is `xicon_infer.job_fields`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from xicon_infer.job_profiles import PROFILES, Value

Kind = Literal["path", "text", "integer", "number", "switch", "choice", "loras"]

PIPELINES: tuple[str, ...] = ("scail", "steady_dancer", "wan_i2v", "wan_t2v", "pose")
SCAIL: tuple[str, ...] = ("scail",)
DANCER: tuple[str, ...] = ("steady_dancer",)
WAN: tuple[str, ...] = ("wan_i2v", "wan_t2v")
VIDEO: tuple[str, ...] = (*SCAIL, *DANCER, *WAN)
"""Those that sample a video."""
DRIVEN: tuple[str, ...] = (*SCAIL, *DANCER, "pose")
"""Those that a driving video or a motion drives."""


@dataclass(frozen=True)
class Field:
    """One option.

    name: of the attribute and the JSON key; the flag is the same with dashes. kind: its type.
    group: a key of `GROUPS`. help: one phrase with the unit. default: one value, or one per
    pipeline. low, high: ends of the range, both allowed. multiple: a size must divide by it, one
    number or one per pipeline.
    pipelines: those that use it; empty = all. choices: all allowed values. also: values allowed
    besides a range. aliases: further flags. flag: the flag where it differs from the name.
    pattern: what a text must match as a whole, any text if empty. form: the same in words.
    """

    name: str
    kind: Kind
    group: str
    help: str
    default: Value | Mapping[str, Value] = None
    low: float = 0
    high: float = 0
    multiple: int | Mapping[str, int] = 1
    pipelines: tuple[str, ...] = ()
    choices: tuple[str | int, ...] = ()
    also: tuple[str | int, ...] = ()
    aliases: tuple[str, ...] = ()
    flag: str = ""
    pattern: str = ""
    form: str = ""

    @property
    def flags(self) -> tuple[str, ...]:
        """Returns the command-line flags, the main one first."""
        return (self.flag or "--" + self.name.replace("_", "-"), *self.aliases)

    def default_for(self, pipeline: str) -> Value:
        """Returns the default in a pipeline, before a profile changes it.

        Where the default differs and the pipeline does not read the option, it is any of them.
        """
        if isinstance(self.default, Mapping):
            return self.default.get(pipeline, next(iter(self.default.values())))
        return self.default

    def multiple_for(self, pipeline: str) -> int:
        """Returns what a value must divide by in a pipeline."""
        return self.multiple if isinstance(self.multiple, int) else self.multiple.get(pipeline, 1)

    @property
    def default_text(self) -> str:
        """Returns the default for a reader, and where pipelines or profiles differ; "" if none."""
        users = self.pipelines or PIPELINES
        plain = {name: self.default_for(name) for name in users}
        parts = [] if self.default is None else _by_value(plain)
        for profile, changes in PROFILES.items():
            changed = {
                name: value
                for name in users
                if (value := changes.get(name, {}).get(self.name)) is not None
                and value != plain[name]
                and value != ()
            }
            parts += [f"{profile}: {text}" for text in _by_value(changed, named=users)]
        return "; ".join(parts)

    def used_by(self, pipeline: str) -> bool:
        """Returns True if the pipeline reads this option."""
        return not self.pipelines or pipeline in self.pipelines

    @property
    def users_text(self) -> str:
        """Returns " (only ...)" where some pipelines do not read the option, else ""."""
        every = not self.pipelines or set(self.pipelines) == set(PIPELINES)
        return "" if every else f" (only {', '.join(self.pipelines)})"


def _by_value(values: Mapping[str, Value], named: tuple[str, ...] = ()) -> list[str]:
    """Returns one text per different value, with the pipelines it is for where they differ.

    Args:
        values: by pipeline.
        named: the pipelines that read the option; those of `values` if empty.
    """
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
        groups.setdefault(text if value is not None else "none", []).append(name)
    everywhere = len(groups) == 1 and len(values) == len(named or values)
    return [text if everywhere else f"{'/'.join(users)} {text}" for text, users in groups.items()]


def choice_of(
    name: str,
    group: str,
    text: str,
    *choices: str | int,
    default: str | int | Mapping[str, Value] | None = None,
    pipelines: tuple[str, ...] = (),
) -> Field:
    """Returns an option with a closed list of values; the first is the default unless given."""
    first = choices[0] if default is None else default
    return Field(name, "choice", group, text, first, pipelines=pipelines, choices=choices)


def integer_of(
    name: str, group: str, text: str, default: int | None, low: int, high: int, multiple: int = 1
) -> Field:
    """Returns an option for a whole number from low to high."""
    return Field(name, "integer", group, text, default, low, high, multiple)


def only(pipelines: tuple[str, ...], *fields: Field) -> tuple[Field, ...]:
    """Returns the options as read by these pipelines alone."""
    return tuple(replace(field, pipelines=pipelines) for field in fields)
