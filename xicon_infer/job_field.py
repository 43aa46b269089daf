"""What one option is, and how options are written down; the table is `xicon_infer.job_fields`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

Kind = Literal["path", "text", "integer", "number", "switch", "choice", "loras"]

Value: TypeAlias = "str | int | float | bool | tuple[()] | None"
"""A default: JSON-like, None where the option may be left out without one."""

PIPELINES: tuple[str, ...] = ("scail", "pose")
SCAIL: tuple[str, ...] = ("scail",)

PROFILES: Mapping[str, Mapping[str, Value]] = MappingProxyType(
    {
        "fast": {},
        # What the authors of SCAIL sample with: Euler, guidance by text alone against an empty
        # negative prompt, the pose present in every step, no distillation.
        "quality": {
            "scheduler": "euler/official",
            "num_inference_steps": 50,
            "shift": 5.0,
            "guidance_scale": 4.0,
            "negative_prompt": "",
            "pose_end": 1.0,
            "loras": (),
        },
    }
)
"""Defaults that a profile changes; a value that is given wins over the profile."""


@dataclass(frozen=True)
class Field:
    """One option.

    name: of the attribute and the JSON key; the flag is the same with dashes. kind: its type.
    group: a key of `GROUPS`. help: one phrase with the unit. default: one value, or one per
    pipeline. low, high: ends of the range, both allowed. multiple: a size must divide by it.
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
    multiple: int = 1
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

    @property
    def default_text(self) -> str:
        """Returns the default for a reader, and where pipelines or profiles differ; "" if none."""
        if self.default is None:
            return ""
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        values = self.default if isinstance(self.default, Mapping) else {"": self.default}
        same = len(set(values.values())) == 1
        parts = [str(v) if same else f"{name} {v}" for name, v in values.items()]
        parts = parts[:1] if same else parts
        changed = ((name, profile.get(self.name)) for name, profile in PROFILES.items())
        parts += [f"{name} {v}" for name, v in changed if v is not None and str(v) != parts[0]]
        return "; ".join(parts)

    def used_by(self, pipeline: str) -> bool:
        """Returns True if the pipeline reads this option."""
        return not self.pipelines or pipeline in self.pipelines

    @property
    def users_text(self) -> str:
        """Returns " (only ...)" where some pipelines do not read the option, else ""."""
        every = not self.pipelines or set(self.pipelines) == set(PIPELINES)
        return "" if every else f" (only {', '.join(self.pipelines)})"


def choice_of(
    name: str,
    group: str,
    text: str,
    *choices: str | int,
    default: str | int | None = None,
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
