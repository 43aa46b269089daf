"""One video to make, fully described."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from xicon_infer.job_fields import FIELDS
from xicon_infer.job_fields_motion import DETECTORS
from xicon_infer.job_values import Lora
from xicon_infer.sizes import Sizing
from xicon_infer.types import Fit

_NTSC_ROUNDING = 0.0009
"""Frames per second by which a rounded NTSC rate may be off; whole rates are further away."""


@dataclass(frozen=True)
class Job:
    """One video to make. The attributes are the options of `FIELDS`; see there for each.

    An option that the pipeline does not read has its default. warnings: repairs, and given options
    that have no effect in this job.
    """

    pipeline: str
    preset: str
    models_dir: Path | None
    loras: tuple[Lora, ...]
    lora_mode: Literal["full", "merge", "comfy_unmerged"]
    transformer: Path | None
    storage: Literal["auto", "reference", "merged-bf16", "merged-fp8"]
    matmul: Literal["auto", "dequant", "scaled_mm_row", "scaled_mm_tensor"]
    fuse_qkv: Literal["auto", "on", "off"]
    decoder: Literal["vae", "tiny"]
    image: Path | None
    end_image: Path | None
    pose_video: Path | None
    negative_pose: Path | None
    track: Path | None
    video: Path | None
    image_fit: Fit
    pose_fit: Fit
    body: Literal["nlf", "rtmw3d"]
    detector: str
    tracker: Literal["none", "botsort", "bytetrack"]
    keypoint_model: Literal["vitpose-h", "vitpose-l", "dwpose"]
    keypoint_decode: Literal["dark", "udp"]
    subject: str
    persons: int
    smooth: float
    align: Literal["auto", "off", "wide"]
    pose_align: Literal["auto", "official", "off"]
    pose_style: Literal["official", "comfyui"]
    pose_cache: bool
    output: Path
    overwrite: bool
    audio: Literal["source", "none"]
    crf: int
    sheet: bool
    pose_preview: bool
    overlay: bool
    save_track: bool
    prompt: str
    negative_prompt: str
    width: int
    height: int
    sizing: Sizing
    num_frames: int | None
    max_frames: int
    skip_frames: int
    select_every_nth: int
    fps: float | Literal["source"]
    profile: str
    num_inference_steps: int
    guidance_scale: float
    shift: float
    scheduler: str
    seed: int
    step_cache: Literal["none", "teacache", "magcache", "easycache"]
    step_cache_threshold: float | Literal["auto"]
    step_cache_start: int | Literal["auto"]
    step_cache_end: int
    uncond_reference: Literal["keep", "zero"]
    condition_guide_scale: float
    st_cond_cfg: float
    end_cond_cfg: float
    pose_strength: float
    pose_start: float
    pose_end: float
    pose_strength_spatial: float
    pose_strength_temporal: float
    pose_clip: bool
    ref_strength: float
    ref_start: float
    ref_end: float
    draw_face: bool
    draw_hands: bool
    pose_render: Literal["full_then_half", "half"]
    pose_rope: Literal["pooled", "midpoint"]
    pose_rope_t_offset: Literal[0, 1]
    clip_preprocess: Literal["stretch", "center"]
    context_schedule: str
    context_frames: int
    context_stride: int
    context_overlap: int
    freenoise: bool
    fuse_method: str
    window_anchor: Literal["every", "first"]
    tile: bool
    tile_height: int
    tile_width: int
    tile_stride_height: int
    tile_stride_width: int
    device: Literal["auto", "cuda", "cpu"]
    dtype: Literal["auto", "bf16", "fp16", "fp32"]
    attention: str
    kernels: Literal["auto", "eager", "triton", "compile"]
    guidance_batching: Literal["auto", "batched", "sequential"]
    memory: Literal["auto", "resident", "offload", "stream"]
    blocks_to_swap: int | Literal["auto"]
    vae_chunk: int | Literal["auto"]
    cudnn_benchmark: bool
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def frame_rate(self) -> Fraction | None:
        """The wanted rate, None for the source's; 23.976, 29.97 and 59.94 mean n * 1000 / 1001."""
        if self.fps == "source":
            return None
        ntsc = Fraction(round(self.fps * 1001 / 1000) * 1000, 1001)
        return ntsc if abs(float(ntsc) - self.fps) < _NTSC_ROUNDING else Fraction(str(self.fps))

    @property
    def guided(self) -> bool:
        """True if a second, unconditional branch runs."""
        return not math.isclose(self.guidance_scale, 1.0)

    @property
    def finds_poses(self) -> bool:
        """True if the motion is found in the driving video: no pose video and no track is given."""
        return self.video is not None and self.pose_video is None and self.track is None

    @property
    def aligns(self) -> bool:
        """True if the motion is fitted to the reference, whose pose is found for that.

        Pipeline steady_dancer fits a saved motion too, if asked to.
        """
        if self.pipeline == "steady_dancer":
            return self.pose_video is None and self.pose_align != "off"
        return self.finds_poses and self.image is not None and self.align != "off"

    @property
    def body_network(self) -> Literal["nlf", "rtmw3d", "none"]:
        """The network for bodies; steady_dancer draws points in the picture and needs none."""
        return "none" if self.pipeline == "steady_dancer" else self.body

    @property
    def detector_path(self) -> Path | None:
        """The ultralytics model that finds the persons, None for a built-in one."""
        return None if self.detector in DETECTORS else Path(self.detector)

    def settings(self) -> dict[str, Any]:
        """Returns every option that the pipeline reads, JSON-able; `make_job` takes it back."""
        used = (option.name for option in FIELDS if option.used_by(self.pipeline))
        return {name: _plain(getattr(self, name)) for name in used}

    def outputs(self) -> dict[str, Path]:
        """Returns every file the job will write, by kind; "video" and "report" are always there.

        Pipeline pose always writes the track and the openpose file; the others are on request.
        """
        alone = self.pipeline == "pose"
        wanted = {
            "video": (True, ".mp4"),
            "report": (True, ".json"),
            "sheet": (self.sheet, ".png"),
            "pose": (self.pose_preview, ".pose.mp4"),
            "overlay": (self.overlay, ".overlay.mp4"),
            "track": (alone or (self.save_track and self.finds_poses), ".npz"),
            "openpose": (alone, ".openpose.json"),
        }
        paths = {kind: self.output.with_suffix(end) for kind, (on, end) in wanted.items() if on}
        return paths | {"video": self.output}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [{"name": lora.name, "strength": lora.strength} for lora in value]
    return value
