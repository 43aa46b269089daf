"""SteadyDancer: a reference picture follows a drawn pose video, starting from the picture itself.

The recipe, one named call a line: fit the reference, fit the pose, encode text, pictures and
poses, make noise, sample, decode. Every stage is a public function, so that a notebook can stop
after any of them. Drawing poses from a dance is another stage: `xicon_infer.pose`.

Numerics follow the authors of SteadyDancer, with three-branch guidance; the profile `fast` follows
the published ComfyUI graph (4 steps, no guidance, a distillation LoRA).

Source: MCG-NJU/SteadyDancer: wan/image2video_dancer.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.components import Components
from pipelines.encode import encode_picture, encode_start, encode_text, encode_video
from pipelines.frames import decode_frames
from pipelines.plan_windows import idle_options
from pipelines.steady_dancer_options import (
    PoseVideos,
    SteadyDancerOptions,
    SteadyDancerOutput,
)
from pipelines.steady_dancer_plan import SIZE_MULTIPLE, output_size
from pipelines.steady_dancer_sampling import (
    SteadyDancerConditioning,
    is_windowed,
    sample,
)
from xicon_infer.errors import InvalidRequest
from xicon_infer.job import resolve_frames
from xicon_infer.media.image import resize_frames
from xicon_infer.models.passes import split_context
from xicon_infer.models.steady_dancer import SteadyDancerTransformer
from xicon_infer.types import Clip, Fit, Progress, SilentProgress, UInt8Array

__all__ = [
    "PoseVideos",
    "SteadyDancerConditioning",
    "SteadyDancerOptions",
    "SteadyDancerOutput",
    "SteadyDancerPipeline",
    "check_negative_pose",
    "choose_num_frames",
    "encode_conditioning",
    "fit_pose",
    "fit_reference",
    "sample",
]

Parts = Components[SteadyDancerTransformer]

CHUNK = 16
"""Pictures resized at once."""


class SteadyDancerPipeline:
    """Holds the networks; calling it makes a video.

    Args:
        components: as `pipelines.loading` makes them.
    """

    def __init__(self, components: Parts) -> None:
        self.components = components

    @torch.inference_mode()
    def __call__(
        self,
        image: UInt8Array,
        pose: PoseVideos,
        options: SteadyDancerOptions,
        progress: Progress | None = None,
    ) -> SteadyDancerOutput:
        """Returns a video that starts with `image` and moves like `pose`.

        Args:
            image: the reference, uint8 [H, W, 3], any size.
            pose: drawn pose videos of any size, their first frame standing where the reference
                stands.
            options: see `SteadyDancerOptions`.
            progress: told of every stage and step.

        Raises:
            InvalidRequest: the options contradict each other, or a pose that they need is missing.
        """
        progress = progress or SilentProgress()
        parts = self.components
        reference = fit_reference(image, options)
        num_frames = choose_num_frames(pose, options, progress)
        check_negative_pose(pose, options, progress)
        with progress.stage("fit pose"):
            poses = [
                fit_pose(clip, num_frames, reference.shape[:2], options.pose_fit, progress)
                for clip in (pose.positive, pose.negative)
                if clip is not None and (clip is pose.positive or options.needs_negative_pose)
            ]
        conditioning = encode_conditioning(parts, reference, poses, options, progress)
        with progress.stage("sample"), parts.sampling():
            latents = sample(parts.transformer, conditioning, options, progress, parts.facts)
        with progress.stage("decode video"), parts.on_device(parts.decoder_part):
            looped = options.context.looped and is_windowed(conditioning, options)
            del conditioning  # keys and values of a 14B model are 0.6 GB
            frames = decode_frames(
                parts.decoder,
                latents,
                tiles=options.tiles,
                looped=looped,
                progress=progress,
                piece=parts.vae_chunk,
                use=parts.frames_to,
            )
        return SteadyDancerOutput(Clip(frames, pose.positive.fps), reference, poses[0])


def fit_reference(image: UInt8Array, options: SteadyDancerOptions) -> UInt8Array:
    """Returns the reference, uint8 [H, W, 3]; its size is the size of the result.

    With an area the size follows the picture, which is then stretched by less than 16 pixels.
    With image_fit "resize" it is smaller than asked for, so that the aspect is kept.
    """
    target = (options.width, options.height)
    size = output_size(
        image.shape[1], image.shape[0], target=target, area=options.area, fit=options.image_fit
    )
    by_area = options.area is not None
    width, height = size if by_area else target
    fit: Fit = "stretch" if by_area else options.image_fit
    return resize_frames(image, width=width, height=height, fit=fit, divisible_by=SIZE_MULTIPLE)


def choose_num_frames(pose: PoseVideos, options: SteadyDancerOptions, progress: Progress) -> int:
    """Returns F = 4n + 1 by the one rule of `resolve_frames`; warns of every repair."""
    num_frames, warnings = resolve_frames(len(pose.positive.frames), options.num_frames)
    anchor = (options.window_anchor, "first")
    idle = idle_options(options.context, num_frames, options.step_cache, anchor)
    for warning in (*warnings, *idle):
        progress.warn(warning)
    return num_frames


def check_negative_pose(pose: PoseVideos, options: SteadyDancerOptions, progress: Progress) -> None:
    """Refuses pose guidance without a negative pose; warns where no step uses it.

    Raises:
        InvalidRequest: the negative pose is missing, or not as long as the positive one.
    """
    guidance = options.guidance
    span = f"{guidance.st_cond_cfg:g} and {guidance.end_cond_cfg:g}"
    if not options.needs_negative_pose:
        if guidance.by_pose:
            progress.warn(
                f"'condition_guide_scale' {guidance.condition_guide_scale:g} has no effect: none "
                f"of {options.num_inference_steps} steps that see the pose lies between {span}"
            )
        return
    if pose.negative is None:
        raise InvalidRequest(
            f"'condition_guide_scale' {guidance.condition_guide_scale:g} needs a negative pose "
            f"video between {span} of the steps, and there is none: give one (drawn from a track "
            "or a driving video it is made for you), or set 'condition_guide_scale' to 0",
            field="condition_guide_scale",
        )
    lengths = len(pose.positive.frames), len(pose.negative.frames)
    if lengths[0] != lengths[1]:
        raise InvalidRequest(
            f"'negative_pose' has {lengths[1]} frames, 'pose_video' {lengths[0]}; both must show "
            "the same motion frame by frame: give a video of the same length and rate",
            field="negative_pose",
        )


def fit_pose(
    clip: Clip, num_frames: int, size: tuple[int, int], fit: Fit, progress: Progress
) -> UInt8Array:
    """Returns the pose pictures at the size of the result, uint8 [F, H, W, 3].

    A longer pose is cut, a shorter one keeps its last picture. What "pad" adds is black.

    Args:
        clip: a drawn pose of any size.
        num_frames: F, at least 1.
        size: (H, W) of the result, pixels.
        fit: how a picture gets that size.
        progress: told of finished frames.
    """
    given = clip.frames[:num_frames]
    out = np.empty((num_frames, *size, 3), np.uint8)
    for start in range(0, len(given), CHUNK):
        part = given[start : start + CHUNK]
        out[start : start + len(part)] = resize_frames(
            part, width=size[1], height=size[0], fit=fit, pad_color=(0, 0, 0)
        )
        progress.step(start + len(part), num_frames, "frame")
    out[len(given) :] = out[len(given) - 1]
    return out


def encode_conditioning(
    parts: Parts,
    reference: UInt8Array,
    poses: list[UInt8Array],
    options: SteadyDancerOptions,
    progress: Progress,
) -> SteadyDancerConditioning:
    """Returns everything the transformer is told. Each encoder leaves the device afterwards.

    The VAE is causal, so the latents of the reference are the first of the start image, and those
    of the first pose frame the first of the pose video: neither is encoded again.

    Args:
        parts: the networks.
        reference: uint8 [H, W, 3].
        poses: the pose pictures, then the negative ones if a step uses them; uint8 [F, H, W, 3].
        options: see `SteadyDancerOptions`.
        progress: told of the stages.
    """
    guided = options.guidance.by_prompt
    texts = encode_text(parts, [options.prompt] + [options.negative_prompt] * guided, progress)
    image = encode_picture(parts, reference, options.clip_preprocess, progress)
    pose_image: Tensor | None = None
    if options.pose_clip:
        pose_image = encode_picture(parts, poses[0][0], options.clip_preprocess, progress)
    with progress.stage("encode reference and pose"):
        start = encode_start(parts, reference, len(poses[0]))
        pose, *negative = (encode_video(parts, frames, progress) for frames in poses)
    with progress.stage("project conditioning"), parts.projecting():
        model = parts.transformer
        told = model.encode_context(texts, image, pose_image)
        contexts = split_context(told, len(texts))
        reference_tokens = model.embed_reference(start[:, 4:, :1])
        first_pose = model.embed_first_pose(pose[:, :, :1])
    return SteadyDancerConditioning(
        with_prompt=contexts[0],
        without_prompt=contexts[1] if guided else None,
        start=start,
        reference=reference_tokens,
        first_pose=first_pose,
        pose=pose,
        negative_pose=negative[0] if negative else None,
    )
