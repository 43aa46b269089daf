"""What the SteadyDancer recipe takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.steady_dancer_plan import SIZE_MULTIPLE, Guidance
from xicon_infer.errors import InvalidRequest
from xicon_infer.models.vae_tiling import TileOptions
from xicon_infer.sampling.cache_options import CacheOptions
from xicon_infer.sampling.schedule import make_schedule
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import Clip, Fit, UInt8Array

POSE_FITS: tuple[Fit, ...] = ("crop", "pad", "stretch")

WindowAnchor = Literal["first", "every"]
"""What starts with the reference: the first window alone, or every window."""


@dataclass(frozen=True)
class SteadyDancerOptions:
    """Every number and choice of one run; the fields of `Job` of the same names.

    width, height: pixels of the result, multiples of 16; not looked at with an area. area: pixels
    of the result in the shape of the reference, as the authors size it, or None. num_frames:
    pixel frames wanted, None for as many as the pose has. seed: 0 to 2**64 - 1. Guidance and pose
    range: see `pipelines.steady_dancer_plan.Guidance`. pose_strength_spatial, _temporal: of the
    structure and the motion of the pose; pose_strength: a factor on both. pose_clip: add the CLIP
    view of the first pose frame. window_anchor: what starts with the reference, see
    `pipelines.steady_dancer_sampling`. step_cache: which steps may be skipped. tiles: decode in
    tiles, None for whole frames.

    Raises:
        InvalidRequest: the size is no multiple of 16, the pose cannot be fitted so, or the
            scheduler cannot make the steps.
    """

    prompt: str = "the human starts to dance"
    negative_prompt: str = ""
    width: int = 576
    height: int = 1024
    area: int | None = None
    num_frames: int | None = None
    num_inference_steps: int = 40
    guidance_scale: float = 5.0
    shift: float = 5.0
    scheduler: str = "unipc/official"
    seed: int = 0
    condition_guide_scale: float = 1.0
    st_cond_cfg: float = 0.1
    end_cond_cfg: float = 0.4
    pose_strength: float = 1.0
    pose_strength_spatial: float = 1.0
    pose_strength_temporal: float = 1.0
    pose_start: float = 0.0
    pose_end: float = 1.0
    pose_clip: bool = True
    context: ContextOptions = field(default_factory=ContextOptions)
    window_anchor: WindowAnchor = "first"
    image_fit: Fit = "crop"
    pose_fit: Fit = "crop"
    clip_preprocess: Literal["stretch", "center"] = "stretch"
    guidance_batching: Literal["auto", "batched", "sequential"] = "auto"
    step_cache: CacheOptions = field(default_factory=CacheOptions)
    tiles: TileOptions | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
                raise InvalidRequest(
                    f"{name!r} must be a positive multiple of {SIZE_MULTIPLE}, got {value}",
                    field=name,
                )
        if self.pose_fit not in POSE_FITS:
            raise InvalidRequest(
                f"'pose_fit' must be one of {', '.join(POSE_FITS)} for a pose video, got "
                f"{self.pose_fit!r}",
                field="pose_fit",
            )
        # Refuses a number of steps that the scheduler cannot make, before anything is loaded.
        make_schedule(self.scheduler, self.num_inference_steps, self.shift)
        self.step_cache.check(self.num_inference_steps, self.guidance_batching)

    @property
    def guidance(self) -> Guidance:
        """Returns what pulls the result, and in which steps."""
        return Guidance(
            guidance_scale=self.guidance_scale,
            condition_guide_scale=self.condition_guide_scale,
            st_cond_cfg=self.st_cond_cfg,
            end_cond_cfg=self.end_cond_cfg,
            pose_start=self.pose_start,
            pose_end=self.pose_end,
        )

    @property
    def needs_negative_pose(self) -> bool:
        """Returns True if some step uses the negative pose."""
        return self.guidance.needs_negative_pose(self.num_inference_steps)


@dataclass(frozen=True)
class PoseVideos:
    """Drawn poses. positive: the motion. negative: the same with a jittered body, or None."""

    positive: Clip
    negative: Clip | None = None


@dataclass(frozen=True)
class SteadyDancerOutput:
    """The result and what it was made from, for a contact sheet.

    clip: the video. reference: uint8 [H, W, 3]. pose_frames: uint8 [F, H, W, 3].
    """

    clip: Clip
    reference: UInt8Array
    pose_frames: UInt8Array
