"""The data that travels between stages. Plain frozen dataclasses; nothing here computes.

Shape letters, here and everywhere: B batch, F pixel frames, T latent frames, H height, W width,
C channels, L tokens, D model width, K keypoints, J joints, P persons.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:  # the command line answers --help without loading numpy
    import numpy as np
    import numpy.typing as npt

UInt8Array: TypeAlias = "npt.NDArray[np.uint8]"
Float32Array: TypeAlias = "npt.NDArray[np.float32]"

Fit = Literal["crop", "resize", "stretch", "pad"]
"""How a picture gets its size: cover and cut, fit inside, distort, or fit inside and fill."""

FITS: tuple[Fit, ...] = ("crop", "resize", "stretch", "pad")

SCHEDULERS: tuple[str, ...] = (
    "dpm++_sde",
    "dpm++",
    "unipc",
    "euler",
    "lcm",
    "flowmatch_distill",
    "flowmatch_causvid",
    "lightx2v_distill",
    "deis",
    "res_multistep",
    "sa_ode_stable",
    "er_sde",
    "rcm",
    "longcat_distill_euler",
    "dpm++_sde/beta",
    "dpm++/beta",
    "unipc/beta",
    "euler/beta",
    "lcm/beta",
    "euler/official",
    "unipc/official",
    "dpm++/official",
)
"""Names of the samplers (`xicon_infer.sampling.schedule` implements each)."""

CONTEXT_SCHEDULES: tuple[str, ...] = ("uniform_standard", "static_standard", "uniform_looped")
FUSE_METHODS: tuple[str, ...] = ("linear", "pyramid")

STEP_CACHES: tuple[str, ...] = ("none", "teacache", "magcache", "easycache")
FEWEST_CACHED_STEPS = 12
"""Steps from which on a step cache is allowed: in fewer, neighbouring steps differ too much."""

LATENT_CHANNELS = 16
SPATIAL_STRIDE = 8
"""Pixels per latent cell, each way (Wan2.1 VAE)."""
TEMPORAL_STRIDE = 4
"""Pixel frames per latent frame after the first, which stands for one pixel frame alone."""


def latent_frames(num_frames: int) -> int:
    """Returns T, the latent frames that F pixel frames give: (F - 1) // 4 + 1."""
    return (num_frames - 1) // TEMPORAL_STRIDE + 1


def pixel_frames(num_latent_frames: int) -> int:
    """Returns F, the pixel frames that T latent frames decode to: 4 (T - 1) + 1."""
    return (num_latent_frames - 1) * TEMPORAL_STRIDE + 1


@dataclass(frozen=True)
class Audio:
    """One audio stream.

    samples: float32 [channels, n], -1 to 1; sample_rate in hertz.
    """

    samples: Float32Array
    sample_rate: int


@dataclass(frozen=True)
class Clip:
    """A video in memory: frames uint8 [F, H, W, 3] RGB, constant fps, optional sound."""

    frames: UInt8Array
    fps: Fraction
    audio: Audio | None = None


@dataclass(frozen=True)
class PoseTrack:
    """One person in 2-D, frame by frame.

    keypoints: float32 [F, K, 2], x and y in pixels of `size`.
    scores: float32 [F, K], 0 to 1.
    bboxes: float32 [F, 4], x1 y1 x2 y2 in pixels.
    size: (H, W) of the frames the pixels refer to.
    """

    keypoints: Float32Array
    scores: Float32Array
    bboxes: Float32Array
    size: tuple[int, int]


@dataclass(frozen=True)
class BodyTrack:
    """The same person in 3-D.

    joints: float32 [F, J, 3], millimetres in camera space (x right, y down, z forward); a frame
        of zeros means the person is not there.
    uncertainties: float32 [F, J], millimetres; zeros where the source gives none.
    intrinsics: float32 [3, 3], pinhole, pixels of the frames the track was made from.
    """

    joints: Float32Array
    uncertainties: Float32Array
    intrinsics: Float32Array


@dataclass(frozen=True)
class Track:
    """One person's whole motion; several persons are a list of tracks."""

    pose: PoseTrack
    body: BodyTrack
    fps: Fraction


@dataclass(frozen=True)
class Stage:
    """What one stage of a job cost: seconds, and peak memory in bytes (device, or host on CPU)."""

    name: str
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Result:
    """What a job made.

    path: the video. mime_type: "video/mp4". seed: the seed used. settings: every setting used.
    stages: time and memory of each. warnings: every repair, fallback or choice made on the way.
    versions: of this package, torch and the libraries used. outputs: name -> path of each other
    file written (report, contact sheet, pose video). machine: device, dtype and attention kernel
    that were used, and where each component came from. pose: what the pose stage found and
    decided; empty where the motion was given.
    """

    path: Path
    mime_type: str
    seed: int
    num_frames: int
    width: int
    height: int
    fps: Fraction
    settings: dict[str, Any]
    stages: list[Stage]
    warnings: list[str]
    versions: dict[str, str]
    outputs: dict[str, Path] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    pose: dict[str, Any] = field(default_factory=dict)


class Progress(Protocol):
    """Where a long job reports to. Every method may raise `Cancelled` to stop the job."""

    def stage(self, name: str) -> Any:
        """Returns a context manager around one stage; nested stages are allowed."""

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Reports that `done` of `total` units of the current stage are finished."""

    def warn(self, message: str) -> None:
        """Records a repair, fallback or choice that the user should know of."""


class SilentProgress:
    """A `Progress` that keeps the warnings and shows nothing."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Does nothing around the stage."""
        yield

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Does nothing."""

    def warn(self, message: str) -> None:
        """Keeps the message."""
        self.warnings.append(message)
