"""What one field of a request is; the table is `xicon_infer.request_fields`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from xicon_infer.settings_table import MODES

Kind = Literal[
    "integer", "number", "boolean", "choice", "text", "media", "object", "loras", "size", "url"
]
Value: TypeAlias = "str | int | float | bool | list[object] | Mapping[str, object] | None"

PIPELINES: Mapping[str, str] = {mode: mode for mode in MODES} | {"pose_only": "pose"}
"""Mode -> pipeline of a `Job`."""

DANCING: tuple[str, ...] = ("scail", "steady_dancer")
DRIVEN: tuple[str, ...] = (*DANCING, "pose_only")
SAMPLED: tuple[str, ...] = (*DANCING, "wan_i2v", "wan_t2v")


@dataclass(frozen=True)
class RequestField:
    """One field.

    name: main name. kind: its type. help: one phrase with the unit. default: one value, or one
    per mode. low, high: ends of the range, both allowed. choices: all allowed values. auto: the
    word "auto" is allowed besides. spellings: other names, the first one given counts. modes:
    those in which it has an effect, empty for all. option: of the `Job`, "" if another module
    reads it. limit: the setting that sets the upper end.
    """

    name: str
    kind: Kind
    help: str
    default: Value | Mapping[str, Value] = None
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    auto: bool = False
    spellings: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    option: str = ""
    limit: str = ""

    def default_for(self, mode: str) -> Value:
        """Returns the default in a mode, before form and profile change it."""
        if isinstance(self.default, Mapping) and set(self.default) >= set(MODES):
            found: Value = self.default.get(mode)  # type: ignore[assignment]
            return found
        return self.default

    def used_by(self, mode: str) -> bool:
        """Returns True if the field has an effect in the mode."""
        return not self.modes or mode in self.modes
