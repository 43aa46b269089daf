"""What a plan says, and where its files lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xicon_infer.weights.manifest import FileEntry
from xicon_infer.weights.places import find_all


@dataclass(frozen=True)
class StepPlan:
    """One sampling step.

    windows: latent frames of each window. pose, reference: their tokens are present. tokens: L
    of the longest forward pass. forwards: forward passes, both guidance branches counted. flops:
    of all of them.
    """

    timestep: float
    windows: tuple[int, ...]
    pose: bool
    reference: bool
    tokens: int
    forwards: int
    flops: int


@dataclass(frozen=True)
class StagePlan:
    """One stage: FLOP, bytes of the weights it needs, and bytes of its tensors beside them."""

    name: str
    flops: int
    weight_bytes: int
    work_bytes: int


@dataclass(frozen=True)
class FilePlan:
    """One model file: where it lies (None if missing) and its bytes (None if unknown).

    listed_bytes: what the manifest says it has, None if that is unknown.
    """

    component: str
    name: str
    path: Path | None
    size_bytes: int | None
    listed_bytes: int | None = None

    @property
    def damaged(self) -> bool:
        """Returns True if the file is there with another size than the one that is listed."""
        return self.path is not None and self.listed_bytes not in (None, self.size_bytes)


@dataclass(frozen=True)
class Plan:
    """The whole job.

    preset: empty where the pipeline has none. driving_frames: frames of the pose after skipping and
    thinning out. tokens: L of the longest forward pass. forwards: of all steps. Without sampling
    there are no steps, latent frames, tokens and forwards. peak_memory_bytes: with one component on
    the device at a time. resident_memory_bytes: with all of them there. notes: what the numbers do
    not count. memory: where the networks lie on the card that was asked for. skips: a step cache
    may leave forward passes out.
    """

    pipeline: str
    preset: str
    width: int
    height: int
    fps: float
    driving_frames: int
    num_frames: int
    output_frames: int
    latent_frames: int
    steps: tuple[StepPlan, ...]
    tokens: int
    forwards: int
    stages: tuple[StagePlan, ...]
    total_flops: int
    peak_memory_bytes: int
    resident_memory_bytes: int
    files: tuple[FilePlan, ...]
    outputs: dict[str, Path]
    warnings: tuple[str, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    skips: bool = False


def file_plan(entry: FileEntry, search_dirs: Sequence[Path]) -> FilePlan:
    """Returns where a file of the manifest lies, and its size as far as it is known."""
    found = find_all([entry], search_dirs).get(entry.id)
    if found is None:
        return FilePlan(entry.component, entry.names[0], None, entry.size_bytes, entry.size_bytes)
    size, listed = found.path.stat().st_size, found.published.size_bytes
    return FilePlan(entry.component, entry.names[0], found.path, size, listed)
