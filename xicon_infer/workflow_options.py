"""Inputs of known nodes that this project does not have: told with a warning, or refused.

Refused is what would make another film: a second sampler, a control video, part of the steps.
Told is what changes the picture little. Inputs about memory, speed and previews are in neither
table, because they change nothing or rounding only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from xicon_infer.workflow_graph import Node, cut, linked, refuse, shown
from xicon_infer.workflow_values import UNKNOWN


class Wanted(NamedTuple):
    """Values of an input that mean the same here, what another one would do, and its weight."""

    values: tuple[object, ...]
    effect: str
    refused: bool = False


_PARTIAL = "only part of the steps would be sampled"
_NO_FILM = "would make another film"
_WHOLE = Wanted((0,), _PARTIAL, True), Wanted((-1,), _PARTIAL, True)
_ROPE = Wanted(("comfy", "comfy_chunked", "default"), "the usual rotary positions are used")
_RIFLEX = Wanted((0,), "RIFLEx is not used")
_SAMPLER = {
    "denoise_strength": Wanted((1,), _PARTIAL, True),
    "start_step": _WHOLE[0],
    "end_step": _WHOLE[1],
    "riflex_freq_index": _RIFLEX,
    "rope_function": _ROPE,
    "add_noise_to_samples": Wanted((False,), "there are no samples to add noise to"),
}
_SCHEDULER = {
    "start_step": _WHOLE[0],
    "end_step": _WHOLE[1],
    "enhance_hf": Wanted((False,), "the usual noise levels are used"),
}
_UPSCALE = {
    "upscale_method": Wanted(("lanczos",), "pictures are resized with Lanczos"),
    "crop_position": Wanted(("center",), "pictures are cut at the centre"),
}

VALUES: Mapping[str, Mapping[str, Wanted]] = MappingProxyType(
    {
        "WanVideoSampler": _SAMPLER,
        "WanVideoSamplerSettings": _SAMPLER,
        "WanVideoSamplerv2": {"add_noise_to_samples": _SAMPLER["add_noise_to_samples"]},
        "WanVideoSamplerExtraArgs": {"riflex_freq_index": _RIFLEX, "rope_function": _ROPE},
        "WanVideoScheduler": _SCHEDULER,
        "WanVideoSchedulerv2": _SCHEDULER,
        "WanVideoTeaCache": {
            "use_coefficients": Wanted((True,), "the fitted coefficients are used"),
            "mode": Wanted(("e",), "time embeddings are compared"),
        },
        "WanVideoMagCache": {"magcache_K": Wanted((4,), "at most 4 steps in a row are skipped")},
        "WanVideoDecode": {"normalization": Wanted(("default",), "frames are not normalised")},
        "WanVideoImageToVideoEncode": {
            "noise_aug_strength": Wanted((0,), "no noise is added to the picture"),
            "start_latent_strength": Wanted((1,), "the first picture has its full strength"),
            "end_latent_strength": Wanted((1,), "the last picture has its full strength"),
            "augment_empty_frames": Wanted((0,), "empty frames stay empty"),
        },
        "WanVideoImageClipEncode": {
            "noise_aug_strength": Wanted((0,), "no noise is added to the picture"),
            "latent_strength": Wanted((1,), "the picture has its full strength"),
            "clip_embed_strength": Wanted((1,), "the picture has its full strength for CLIP"),
            "adjust_resolution": Wanted((False,), "the size is that of the graph; see --sizing"),
        },
        "WanVideoClipVisionEncode": {
            "strength_1": Wanted((1,), "the picture has its full strength for CLIP"),
            "tiles": Wanted((0,), "CLIP sees the picture as a whole"),
        },
        "WanVideoEncode": {
            "noise_aug_strength": Wanted((0,), "no noise is added to the pose"),
            "latent_strength": Wanted((1,), "the pose has its full strength"),
        },
        "RenderNLFPoses": {"scale_hands": Wanted((True,), "hands are fitted with the body")},
        "DrawViTPose": {
            "body_stick_width": Wanted((-1,), "lines have their usual width"),
            "hand_stick_width": Wanted((-1,), "lines have their usual width"),
            "draw_head": Wanted((True, "full"), "the head is drawn"),
        },
        "GetImageRangeFromBatch": {
            "start_index": Wanted((0,), "the first picture is used"),
        },
        "ImageResizeKJv2": _UPSCALE,
        "ImageResizeKJ": {"upscale_method": _UPSCALE["upscale_method"]},
        "VHS_LoadVideoFFmpeg": {"start_time": Wanted((0,), "the video is read from its start")},
        "VHS_LoadVideoFFmpegPath": {"start_time": Wanted((0,), "the video is read from its start")},
        "VHS_VideoCombine": {
            "format": Wanted(("video/h264-mp4",), "the film is H.264 in an .mp4 file"),
            "pix_fmt": Wanted(("yuv420p",), "the film is yuv420p"),
            "pingpong": Wanted((False,), "the film runs forwards only"),
            "loop_count": Wanted((0,), "the film is not repeated"),
            "trim_to_audio": Wanted((False,), "the film has all its frames"),
        },
    }
)
"""Class -> input -> what it must be to be done exactly."""

_EMBEDS = {
    name: Wanted((), _NO_FILM, True)
    for name in ("unianimate_poses", "fantasytalking_embeds", "uni3c_embeds", "multitalk_embeds")
}
_EXTRAS = {
    "feta_args": Wanted((), "Enhance-A-Video is not used"),
    "slg_args": Wanted((), "skip-layer guidance is not used"),
    "loop_args": Wanted((), "the film is not looped"),
    "experimental_args": Wanted((), "experimental options are not used"),
}
_SAMPLER_LINKS = {
    **_EMBEDS,
    **_EXTRAS,
    "samples": Wanted((), "a film is always sampled from noise, in one pass", True),
    "sigmas": Wanted((), "noise levels come from the scheduler", True),
    "flowedit_args": Wanted((), _NO_FILM, True),
    "freeinit_args": Wanted((), "FreeInit is not used"),
}

LINKS: Mapping[str, Mapping[str, Wanted]] = MappingProxyType(
    {
        "WanVideoSampler": _SAMPLER_LINKS,
        "WanVideoSamplerSettings": _SAMPLER_LINKS,
        "WanVideoSamplerv2": {"samples": _SAMPLER_LINKS["samples"]},
        "WanVideoSamplerExtraArgs": {**_EMBEDS, **_EXTRAS},
        "WanVideoScheduler": {"sigmas": _SAMPLER_LINKS["sigmas"]},
        "WanVideoSchedulerv2": {"sigmas": _SAMPLER_LINKS["sigmas"]},
        "WanVideoModelLoader": {
            name: Wanted((), _NO_FILM, True)
            for name in (
                *("extra_model", "vace_model", "fantasytalking_model", "multitalk_model"),
                "fantasyportrait_model",
            )
        },
        "WanVideoEmptyEmbeds": {
            name: Wanted((), _NO_FILM, True) for name in ("control_embeds", "extra_latents")
        },
        "WanVideoImageToVideoEncode": {
            **{
                name: Wanted((), _NO_FILM, True)
                for name in (
                    *("control_embeds", "temporal_mask", "extra_latents", "add_cond_latents"),
                )
            },
            "empty_frame_pad_image": Wanted((), "empty frames stay empty"),
        },
        "WanVideoClipVisionEncode": {
            "negative_image": Wanted((), "there is no negative picture"),
        },
        "WanVideoContextOptions": {
            "reference_latent": Wanted((), "windows have no reference of their own"),
        },
        "WanVideoLoraSelect": {"blocks": Wanted((), "the LoRA acts on all blocks")},
        "WanVideoLoraSelectByName": {"blocks": Wanted((), "the LoRAs act on all blocks")},
        "WanVideoLoraSelectMulti": {"blocks": Wanted((), "the LoRAs act on all blocks")},
        "WanVideoTextEncodeCached": {
            "extender_args": Wanted((), "the prompt is taken as written"),
        },
        "WanVideoAddSteadyDancerEmbeds": {
            "pose_latents_negative": Wanted((), "see --condition-guide-scale"),
        },
        "WanVideoEncode": {"mask": Wanted((), "the whole picture is encoded")},
        "RenderNLFPoses": {
            name: Wanted((), "the figure is drawn without it")
            for name in ("bboxes", "pose_video_mask")
        },
        "PoseAndFaceDetection": {
            "retarget_image": Wanted((), "the motion is fitted to the reference; see --pose-align"),
        },
        "VHS_LoadVideo": {
            "vae": Wanted((), _NO_FILM, True),
            "meta_batch": Wanted((), _NO_FILM, True),
        },
        "VHS_LoadVideoPath": {
            "vae": Wanted((), _NO_FILM, True),
            "meta_batch": Wanted((), _NO_FILM, True),
        },
    }
)
"""Class -> input -> what is done where something is connected to it."""

_NODE_EFFECTS: Mapping[str, str] = MappingProxyType(
    {
        "WanVideoSetRadialAttention": "radial attention is not used",
        "WanVideoSetAttentionModeOverride": "all blocks and steps use one kind of attention",
        "WanVideoApplyNAG": "normalised attention guidance is not used",
        "WanVideoTinyVAELoader": "the full VAE is used",
        "ImageResize+": "pictures are resized with Lanczos and cut at the centre",
        "WanVideoImageResizeToClosest": "the size is that of the graph; see --sizing",
    }
)
"""Class -> what is done instead of what the node does as a whole."""


def named(node: Node, name: str = "") -> str:
    """Returns how a message names a node or one of its inputs."""
    return f"node {cut(node.id)} {cut(node.type)}" + (f".{name}" if name else "")


def unsupported(nodes: Iterable[tuple[Node, Mapping[str, Any]]]) -> list[str]:
    """Returns a warning for every input that is set to something this project does not do.

    Args:
        nodes: each with the constants of the inputs that `VALUES` names.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, the first that would make another film.
    """
    warnings = []
    for node, values in nodes:
        if node.type in _NODE_EFFECTS:
            warnings.append(f"{named(node)}: not translated, {_NODE_EFFECTS[node.type]}")
        for name, wanted in LINKS.get(node.type, {}).items():
            if linked(node, name):
                warnings.append(_told(node, name, "connected", wanted))
        for name, wanted in VALUES.get(node.type, {}).items():
            value = values.get(name)
            if not _same(value, wanted):
                text = "computed by the graph" if value is UNKNOWN else shown(value)
                warnings.append(_told(node, name, text, wanted))
    return warnings


def _same(value: object, wanted: Wanted) -> bool:
    """Returns True if the value means what this project does; nothing and "" are the default."""
    return value is None or value == "" or any(value == one for one in wanted.values)


def _told(node: Node, name: str, value: str, wanted: Wanted) -> str:
    """Returns the warning about an input.

    Raises:
        InvalidRequest: it would make another film.
    """
    if wanted.refused:
        place = f"Workflow node '{cut(node.id)}' ({cut(node.type)}): '{name}' is {value}"
        raise refuse(f"{place}, which is not supported: {wanted.effect}")
    return f"{named(node, name)}: {value} is not translated, {wanted.effect}"
