"""The least that each pipeline needs, and which pipeline an option can be tried with."""

from __future__ import annotations

from typing import Any

from xicon_infer.job_field import Field

LEAST: dict[str, dict[str, Any]] = {
    "scail": {"image": "ref.png", "track": "dance.npz"},
    "steady_dancer": {"image": "ref.png", "track": "dance.npz"},
    "wan_i2v": {"image": "ref.png"},
    "wan_t2v": {"prompt": "a fox"},
    "pose": {"track": "dance.npz"},
}


def pipeline_of(field: Field) -> str:
    """Returns a pipeline that reads the option: scail if it does."""
    return next(name for name in LEAST if field.used_by(name))


def least_for(field: Field) -> dict[str, Any]:
    """Returns the least values of a job that reads the option."""
    name = pipeline_of(field)
    return {"pipeline": name, **LEAST[name]}


def companions(name: str, value: Any) -> dict[str, Any]:
    """Returns the other options that make this value of an option possible."""
    video = {"track": None, "video": "dance.mp4"}
    others: dict[str, Any] = {
        "width": {"height": 128},
        "height": {"width": 128},
        "pose_start": {"pose_end": 1.0},
        "ref_end": {"ref_start": 0.0},
        "st_cond_cfg": {"end_cond_cfg": 1.0},
        "end_cond_cfg": {"st_cond_cfg": 0.0},
        "context_frames": {"context_overlap": 4},
        "context_overlap": {"context_frames": 321},
        "tile_height": {"tile_stride_height": 32},
        "tile_width": {"tile_stride_width": 32},
        "tile_stride_height": {"tile_height": 2048},
        "tile_stride_width": {"tile_width": 2048},
        "tracker": {"detector": "mine.pt"},
        "overlay": video,
        "negative_pose": {"track": None, "pose_video": "pose.mp4"},
        "end_image": {"preset": "flf2v-bf16"},
        **{
            f"step_cache{part}": {"num_inference_steps": 100}
            for part in ("", "_threshold", "_start", "_end")
        },
        # A track is never stretched.
        "pose_fit": {"track": None, "pose_video": "p.mp4"},
    }
    return others.get(name, {})
