"""What a check is told, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

State: TypeAlias = Literal["ok", "warn", "fail"]
"""ok: as it should be. warn: jobs run, but slower or not all of them. fail: take no job."""

MemoryRequest: TypeAlias = Literal["auto", "resident", "offload", "stream"]


class Outcome(NamedTuple):
    """What one check found: state, a sentence, and what to do about it ("" if nothing)."""

    state: State
    text: str
    fix: str = ""


@dataclass(frozen=True)
class CheckResult:
    """One line of the report. seconds: what the check took."""

    name: str
    state: State
    text: str
    seconds: float
    fix: str = ""


@dataclass(frozen=True)
class CheckNeeds:
    """What the machine must be able to do.

    modes: mode -> sets of weights, as "scail/fp8"; a mode without sets needs no file. search_dirs:
    folders with weights. any_mode: one complete mode is enough, the others give a warning. gpu:
    False lets a CPU do. memory: how the networks shall lie. attention: kernels of the family that
    was asked for, empty for any. tmp: where jobs have their folders. verify: also compare sha256.
    bucket: raises what is wrong with the storage; None without a bucket. default_video: driving
    video of requests without one.
    """

    modes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    search_dirs: tuple[Path, ...] = ()
    any_mode: bool = False
    gpu: bool = True
    memory: MemoryRequest = "auto"
    attention: tuple[str, ...] = ()
    tmp: Path = Path("/tmp/xicon")
    verify: bool = False
    bucket: Callable[[], None] | None = None
    default_video: Path | None = None


Check: TypeAlias = Callable[[], Outcome]
Checks: TypeAlias = Iterator[tuple[str, Check]]
"""Name and work of each check; the work is done by whoever takes it."""
