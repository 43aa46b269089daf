"""Which widget of a ComfyUI node is which: a UI export lists their values without names.

The order is that of the node's own definition. Exports of newer ComfyUI name the widgets in
`inputs`; those names are taken where there are as many of them as values. Where neither fits, the
values that can be told apart by their kind are used and a warning says so.

Source: INPUT_TYPES of the classes named in `xicon_infer.workflow_nodes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_CONTROL = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
_SEEDS = ("seed", "noise_seed")
_NOT_WIDGETS = ("videopreview", "choose video to upload", "choose file to upload", "upload")

_SAMPLER = (
    "steps:n cfg:n shift:n seed:n force_offload:b scheduler:s riflex_freq_index:n "
    "denoise_strength:n batched_cfg:b rope_function:s start_step:n end_step:n "
    "add_noise_to_samples:b"
)
_SCHEDULER = "scheduler:s steps:n shift:n start_step:n end_step:n enhance_hf:b"
_RANGE = "strength:n start_percent:n end_percent:n"
_TILES = "enable_vae_tiling:b tile_x:n tile_y:n tile_stride_x:n tile_stride_y:n"
_LOAD = (
    "video:s force_rate:n custom_width:n custom_height:n frame_load_cap:n skip_first_frames:n "
    "select_every_nth:n format:s"
)

_ORDER: Mapping[str, str] = MappingProxyType(
    {
        "LoadImage": "image:s",
        "VHS_LoadImagePath": "image:s custom_width:n custom_height:n",
        "VHS_LoadVideo": _LOAD,
        "VHS_LoadVideoPath": _LOAD,
        "VHS_VideoCombine": (
            "frame_rate:n loop_count:n filename_prefix:s format:s pingpong:b save_output:b"
        ),
        "CreateVideo": "fps:n",
        "SaveVideo": "filename_prefix:s format:s codec:s",
        "INTConstant": "value:n",
        "FloatConstant": "value:n",
        "BOOLConstant": "value:b",
        "StringConstant": "string:s",
        "StringConstantMultiline": "string:s strip_newlines:b",
        "PrimitiveInt": "value:n",
        "PrimitiveFloat": "value:n",
        "PrimitiveBoolean": "value:b",
        "PrimitiveString": "value:s",
        "PrimitiveStringMultiline": "value:s",
        "CM_IntToFloat": "a:n",
        "SimpleCalculatorKJ": "expression:s",
        "ImageResizeKJv2": (
            "width:n height:n upscale_method:s keep_proportion:s pad_color:s crop_position:s "
            "divisible_by:n device:s"
        ),
        "ImageResizeKJ": (
            "width:n height:n upscale_method:s keep_proportion:b divisible_by:n crop:s"
        ),
        "GetImageSizeAndCount": "",
        "GetImageRangeFromBatch": "start_index:n num_frames:n",
        "ImageConcatMulti": "inputcount:n direction:s match_image_size:b",
        "CLIPVisionLoader": "clip_name:s",
        "CLIPLoader": "clip_name:s type:s device:s",
        "CLIPTextEncode": "text:s",
        "NLFPredict": "per_batch:n",
        "DownloadAndLoadNLFModel": "url:s warmup:b",
        "LoadNLFModel": "nlf_model:s warmup:b",
        "NLFModelLoader": "nlf_model:s warmup:b",
        "RenderNLFPoses": (
            "width:n height:n draw_face:b draw_hands:b render_device:s scale_hands:b "
            "render_backend:s"
        ),
        "OnnxDetectionModelLoader": "vitpose_model:s yolo_model:s onnx_device:s",
        "PoseAndFaceDetection": "width:n height:n face_padding:n",
        "DrawViTPose": (
            "width:n height:n retarget_padding:n body_stick_width:n hand_stick_width:n draw_head:b"
        ),
        "PoseDetectionOneToAllAnimation": (
            "width:n height:n align_to:s draw_face_points:s draw_head:s"
        ),
        "WanVideoModelLoader": (
            "model:s base_precision:s quantization:s load_device:s attention_mode:s "
            "rms_norm_function:s"
        ),
        "WanVideoVAELoader": "model_name:s precision:s use_cpu_cache:b verbose:b",
        "WanVideoTinyVAELoader": "model_name:s precision:s parallel:b",
        "WanVideoTeaCache": (
            "rel_l1_thresh:n start_step:n end_step:n cache_device:s use_coefficients:b mode:s"
        ),
        "WanVideoMagCache": (
            "magcache_thresh:n magcache_K:n start_step:n end_step:n cache_device:s"
        ),
        "WanVideoEasyCache": "easycache_thresh:n start_step:n end_step:n cache_device:s",
        "WanVideoBlockSwap": (
            "blocks_to_swap:n offload_img_emb:b offload_txt_emb:b use_non_blocking:b "
            "vace_blocks_to_swap:n prefetch_blocks:n block_swap_debug:b"
        ),
        "WanVideoLoraSelect": "lora:s strength:n low_mem_load:b merge_loras:b",
        "WanVideoLoraSelectByName": "lora_name:s strength:n low_mem_load:b merge_loras:b",
        "WanVideoLoraSelectMulti": (
            " ".join(f"lora_{n}:s strength_{n}:n" for n in range(5))
            + " low_mem_load:b merge_loras:b"
        ),
        "WanVideoSetLoRAs": "",
        "WanVideoSetBlockSwap": "",
        "WanVideoEmptyEmbeds": "width:n height:n num_frames:n",
        "WanVideoTextEncode": (
            "positive_prompt:s negative_prompt:s force_offload:b use_disk_cache:b device:s"
        ),
        "WanVideoTextEncodeCached": (
            "model_name:s precision:s positive_prompt:s negative_prompt:s quantization:s "
            "use_disk_cache:b device:s"
        ),
        "WanVideoTextEncodeSingle": "prompt:s force_offload:b use_disk_cache:b device:s",
        "LoadWanVideoT5TextEncoder": "model_name:s precision:s load_device:s quantization:s",
        "LoadWanVideoClipTextEncoder": "model_name:s precision:s load_device:s",
        "WanVideoClipVisionEncode": (
            "strength_1:n strength_2:n crop:s combine_embeds:s force_offload:b tiles:n ratio:n"
        ),
        "WanVideoAddSCAILReferenceEmbeds": _RANGE,
        "WanVideoAddSCAILPoseEmbeds": _RANGE,
        "WanVideoAddSteadyDancerEmbeds": (
            "pose_strength_spatial:n pose_strength_temporal:n start_percent:n end_percent:n"
        ),
        "WanVideoImageToVideoEncode": (
            "width:n height:n num_frames:n noise_aug_strength:n start_latent_strength:n "
            "end_latent_strength:n force_offload:b fun_or_fl2v_model:b tiled_vae:b "
            "augment_empty_frames:n"
        ),
        "WanVideoImageClipEncode": (
            "generation_width:n generation_height:n num_frames:n force_offload:b "
            "noise_aug_strength:n latent_strength:n clip_embed_strength:n adjust_resolution:b"
        ),
        "WanVideoEncode": f"{_TILES} noise_aug_strength:n latent_strength:n",
        "WanVideoDecode": f"{_TILES} normalization:s",
        "WanVideoSampler": _SAMPLER,
        "WanVideoSamplerSettings": _SAMPLER,
        "WanVideoSamplerv2": "cfg:n seed:n force_offload:b add_noise_to_samples:b",
        "WanVideoSamplerFromSettings": "",
        "WanVideoScheduler": _SCHEDULER,
        "WanVideoSchedulerv2": _SCHEDULER,
        "WanVideoSamplerExtraArgs": "riflex_freq_index:n rope_function:s",
        "WanVideoContextOptions": (
            "context_schedule:s context_frames:n context_stride:n context_overlap:n freenoise:b "
            "verbose:b fuse_method:s"
        ),
    }
)
"""Class -> its widgets in order, each with its kind: n number, s text, b yes or no."""

WIDGETS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {name: tuple((part[:-2], part[-1]) for part in order.split()) for name, order in _ORDER.items()}
)
"""Class -> (widget, kind) in order."""


def widget_inputs(node: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """Returns widget -> value of a node of a UI export.

    Args:
        node: as exported, with `type`, `inputs` and `widgets_values`.
        warnings: gets one where the values do not fit the widgets that are known.
    """
    values = node.get("widgets_values")
    if isinstance(values, Mapping):
        return {str(name): one for name, one in values.items() if name not in _NOT_WIDGETS}
    if not isinstance(values, list):
        return {}
    kind = str(node.get("type"))
    known = WIDGETS.get(kind)
    names = _widget_names(node)
    table = dict(known or ())
    for order in (names, [name for name, _ in known or ()]):
        found, rest = _laid_out(order, values)
        if order and not rest and _fits(found, table):
            return found
    if known is None:
        return {}
    found, rest = _laid_out([name for name, _ in known], values)
    good = {name: value for name, value in found.items() if _is(value, table[name])}
    if rest or len(good) < len(found):
        label = f"node {node.get('id')} {kind}"
        warnings.append(
            f"{label}: its widgets are not those of the version known here; read: "
            + (", ".join(good) or "none")
        )
    return good


def _widget_names(node: Mapping[str, Any]) -> list[str]:
    """Returns the widgets that the inputs of a node name, in order."""
    names = []
    inputs = node.get("inputs")
    for entry in inputs if isinstance(inputs, list) else ():
        widget = entry.get("widget") if isinstance(entry, Mapping) else None
        name = widget.get("name") if isinstance(widget, Mapping) else None
        if isinstance(name, str) and name not in _NOT_WIDGETS:
            names.append(name)
    return names


def _laid_out(order: list[str], values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Returns widget -> value, and the values that are left; what the UI alone has is dropped."""
    waiting = list(reversed([value for value in values if not _is_markup(value)]))
    found: dict[str, Any] = {}
    for name in order:
        if not waiting:
            break
        found[name] = waiting.pop()
        if name in _SEEDS and waiting and waiting[-1] in _CONTROL:
            waiting.pop()
    rest = [value for value in reversed(waiting) if value not in (None, "", "image")]
    return found, rest


def _is_markup(value: object) -> bool:
    """Returns True for what a node shows as text or picture, such as the plot of a schedule."""
    return isinstance(value, str) and value.startswith(("<img", "<tr", "<details", "<table"))


def _fits(found: Mapping[str, Any], table: Mapping[str, str]) -> bool:
    return all(_is(value, table[name]) for name, value in found.items() if name in table)


def _is(value: object, kind: str) -> bool:
    """Returns True if a value is of the kind; nothing and "" stand for the default."""
    if value is None or value == "":
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # 0 and 1 are what older exports have for no and yes, and the other way round.
    switch = isinstance(value, bool) or value in (0, 1)
    return {"n": number or switch, "s": isinstance(value, str), "b": switch}[kind]
