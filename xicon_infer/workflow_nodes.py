"""The ComfyUI nodes this project can read: their classes, defaults and unsupported inputs.

Class and input names, and the defaults of nodes, are facts of the node packs. What is in none of
these tables is an unknown node.

Source: kijai/ComfyUI-WanVideoWrapper: nodes.py, nodes_sampler.py, nodes_model_loading.py,
SCAIL/nodes.py, steadydancer/nodes.py; kijai/ComfyUI-KJNodes: nodes/image_nodes.py;
Kosinkadink/ComfyUI-VideoHelperSuite: videohelpersuite/;
kijai/ComfyUI-WanAnimatePreprocess: nodes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from xicon_infer.workflow_values import CONSTANTS

KNOWN: frozenset[str] = frozenset(
    [
        "LoadImage",
        "VHS_LoadVideo",
        "VHS_LoadVideoPath",
        "VHS_VideoCombine",
        "INTConstant",
        "FloatConstant",
        "SimpleCalculatorKJ",
        "ImageResizeKJv2",
        "GetImageSizeAndCount",
        "CLIPVisionLoader",
        "NLFPredict",
        "DownloadAndLoadNLFModel",
        "LoadNLFModel",
        "RenderNLFPoses",
        "OnnxDetectionModelLoader",
        "PoseDetectionVitPoseToDWPose",
        "WanVideoModelLoader",
        "WanVideoVAELoader",
        "WanVideoDecode",
        "WanVideoBlockSwap",
        "WanVideoSetBlockSwap",
        "WanVideoLoraSelect",
        "WanVideoSetLoRAs",
        "WanVideoEmptyEmbeds",
        "WanVideoClipVisionEncode",
        "WanVideoAddSCAILPoseEmbeds",
        "WanVideoAddSCAILReferenceEmbeds",
        "WanVideoAddSteadyDancerEmbeds",
        "WanVideoImageToVideoEncode",
        "WanVideoSampler",
        "WanVideoSamplerv2",
        "WanVideoScheduler",
        "WanVideoSchedulerv2",
        "WanVideoSamplerExtraArgs",
        "WanVideoContextOptions",
        "WanVideoTextEncode",
        "WanVideoTextEncodeCached",
        "LoadWanVideoT5TextEncoder",
    ]
)
"""Classes that a graph in a request may have: the list of the request contract."""

IMPORTED: frozenset[str] = KNOWN | frozenset(
    [
        "WanVideoEncode",
        "WanVideoSamplerSettings",
        "WanVideoSamplerFromSettings",
        "PoseAndFaceDetection",
        "DrawViTPose",
        "PoseDetectionOneToAllAnimation",
        "NLFModelLoader",
        "NLFPredictPoses",
        "GetImageRangeFromBatch",
        "ImageResizeKJ",
        "ImageResize+",
        "WanVideoTorchCompileSettings",
        "WanVideoVRAMManagement",
        "WanVideoLoraSelectMulti",
        "WanVideoLoraSelectByName",
        "WanVideoTextEmbedBridge",
        "WanVideoTextEncodeSingle",
        "WanVideoApplyNAG",
        "CLIPTextEncode",
        "CLIPLoader",
        "WanVideoImageClipEncode",
        "LoadWanVideoClipTextEncoder",
        "WanVideoTinyVAELoader",
        "WanVideoSetRadialAttention",
        "WanVideoSetAttentionModeOverride",
        "WanVideoEnhanceAVideo",
        "WanVideoTeaCache",
        "WanVideoMagCache",
        "WanVideoEasyCache",
        "WanVideoSLG",
        "WanVideoExperimentalArgs",
        "WanVideoLoopArgs",
        "WanVideoFreeInitArgs",
        "WanVideoBlockList",
        "WanVideoImageResizeToClosest",
        "VHS_LoadVideoFFmpeg",
        "VHS_LoadVideoFFmpegPath",
        "VHS_LoadImagePath",
        "CreateVideo",
        "SaveVideo",
        *CONSTANTS,
    ]
)
"""Classes that the command line importer reads besides."""

SIDE: frozenset[str] = frozenset(
    [
        "Note",
        "MarkdownNote",
        "PreviewImage",
        "PreviewAny",
        "PreviewVideo",
        "ShowText",
        "ShowText|pysssh",
        "PlaySound|pysssss",
        "SaveImage",
        "SaveAnimatedWEBP",
        "SaveAudio",
        "PreviewAudio",
        "ImageConcatMulti",
        "ImageConcanate",
        "AddLabel",
        "EmptyImage",
        "WanVideoPreviewEmbeds",
        "VHS_VideoInfo",
        "VHS_VideoInfoLoaded",
        "WidgetToString",
        "Label",
        "easy_showAnything",
        "Display_Any",
        "MaskPreview",
        "MaskPreview+",
        "ImageAndMaskPreview",
        "SleepNodeAny",
        "VRAM_Debug",
        "CreateShapeMask",
        "PoseRetargetPromptHelper",
    ]
)
"""Classes that only show, save or say something."""

SAMPLERS: tuple[str, ...] = ("WanVideoSampler", "WanVideoSamplerv2", "WanVideoSamplerSettings")
COMBINES: Mapping[str, str] = MappingProxyType(
    {"VHS_VideoCombine": "frame_rate", "CreateVideo": "fps"}
)
"""Classes that make a film of pictures -> their input for frames per second."""

VIDEOS: tuple[str, ...] = (
    *("VHS_LoadVideo", "VHS_LoadVideoPath"),
    *("VHS_LoadVideoFFmpeg", "VHS_LoadVideoFFmpegPath"),
)
PICTURES: tuple[str, ...] = ("LoadImage", "VHS_LoadImagePath")
RESIZES: tuple[str, ...] = ("ImageResizeKJv2", "ImageResizeKJ")

IMAGE_STEPS: Mapping[str, str] = MappingProxyType(
    {
        "GetImageSizeAndCount": "image",
        **dict.fromkeys(RESIZES, "image"),
        "ImageResize+": "image",
        "WanVideoImageResizeToClosest": "image",
        "GetImageRangeFromBatch": "images",
    }
)
"""Classes whose picture is that of an input, at most resized."""

POSE_STEPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "RenderNLFPoses": ("nlf_poses", "dw_poses"),
        "NLFPredict": ("images", "image"),
        "NLFPredictPoses": ("images",),
        "PoseDetectionVitPoseToDWPose": ("images",),
        "DrawViTPose": ("pose_data",),
        "PoseAndFaceDetection": ("images",),
        "PoseDetectionOneToAllAnimation": ("images",),
    }
)
"""Classes that find or draw a pose -> the inputs that lead to the driving video."""

DRAWERS: tuple[str, ...] = ("RenderNLFPoses", "DrawViTPose", "PoseDetectionOneToAllAnimation")

MODEL_STEPS: frozenset[str] = frozenset(
    [
        "WanVideoSetLoRAs",
        "WanVideoSetBlockSwap",
        "WanVideoSetRadialAttention",
        "WanVideoSetAttentionModeOverride",
    ]
)
"""Classes that take a model and give it on."""

_SAMPLING = {
    "steps": 30,
    "cfg": 6.0,
    "shift": 5.0,
    "seed": 0,
    "scheduler": "unipc",
}
_SCHEDULE = {"scheduler": "unipc", "steps": 30, "shift": 5.0}
_TARGET = {"width": 832, "height": 480, "num_frames": 81}
_RANGE = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
_LOAD = {"force_rate": 0, "frame_load_cap": 0, "skip_first_frames": 0, "select_every_nth": 1}

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "WanVideoSampler": _SAMPLING,
        "WanVideoSamplerSettings": _SAMPLING,
        "WanVideoSamplerv2": {"cfg": 6.0, "seed": 0},
        "WanVideoScheduler": _SCHEDULE,
        "WanVideoSchedulerv2": _SCHEDULE,
        "WanVideoEmptyEmbeds": _TARGET,
        "WanVideoImageToVideoEncode": _TARGET,
        "WanVideoImageClipEncode": {
            "generation_width": 832,
            "generation_height": 480,
            "num_frames": 81,
        },
        "WanVideoAddSCAILPoseEmbeds": _RANGE,
        "WanVideoAddSCAILReferenceEmbeds": _RANGE,
        "WanVideoAddSteadyDancerEmbeds": {
            "pose_strength_spatial": 1.0,
            "pose_strength_temporal": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
        },
        "WanVideoContextOptions": {
            "context_schedule": "uniform_standard",
            "context_frames": 81,
            "context_stride": 4,
            "context_overlap": 16,
            "freenoise": True,
            "fuse_method": "linear",
        },
        "WanVideoTextEncode": {"positive_prompt": "", "negative_prompt": ""},
        "WanVideoTextEncodeCached": {"positive_prompt": "", "negative_prompt": ""},
        "WanVideoTextEncodeSingle": {"prompt": ""},
        "CLIPTextEncode": {"text": ""},
        "WanVideoDecode": {"enable_vae_tiling": False},
        "WanVideoBlockSwap": {"blocks_to_swap": 20},
        "WanVideoModelLoader": {"attention_mode": "sdpa"},
        "WanVideoLoraSelect": {"strength": 1.0},
        "WanVideoLoraSelectByName": {"strength": 1.0},
        "WanVideoClipVisionEncode": {"crop": "center"},
        "RenderNLFPoses": {"draw_face": True, "draw_hands": True},
        "ImageResizeKJv2": {"width": 512, "height": 512, "divisible_by": 2},
        "ImageResizeKJ": {"width": 512, "height": 512, "divisible_by": 2},
        **dict.fromkeys(VIDEOS, _LOAD),
        "WanVideoTeaCache": {
            "rel_l1_thresh": 0.3,
            "start_step": 1,
            "end_step": -1,
            "use_coefficients": True,
            "mode": "e",
        },
        "WanVideoMagCache": {
            "magcache_thresh": 0.02,
            "magcache_K": 4,
            "start_step": 1,
            "end_step": -1,
        },
        "WanVideoEasyCache": {"easycache_thresh": 0.015, "start_step": 10, "end_step": -1},
        "VHS_VideoCombine": {"frame_rate": 8, "crf": 19, "save_output": True},
        "CreateVideo": {"fps": 30},
    }
)
"""Class -> input -> what the node takes where a graph leaves it out; only inputs that are read."""

CACHES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "WanVideoTeaCache": ("teacache", "rel_l1_thresh"),
        "WanVideoMagCache": ("magcache", "magcache_thresh"),
        "WanVideoEasyCache": ("easycache", "easycache_thresh"),
    }
)
"""Class of a step cache -> its name here, and its input for the threshold."""

ATTENTION: Mapping[str, str] = MappingProxyType(
    {
        "sdpa": "sdpa",
        "comfy": "auto",
        "flash_attn_2": "flash",
        "flash_attn_3": "flash",
        "sageattn": "sage",
        "sageattn_3": "sage",
        "sageattn_compiled": "sage",
        "sageattn_ultravico": "sage",
        "radial_sage_attention": "sage",
    }
)
"""attention_mode of WanVideoModelLoader -> of a request."""

SUFFIXES: tuple[str, ...] = (" [input]", " [output]", " [temp]")
"""What ComfyUI writes behind the name of a file to say in which folder it is."""
