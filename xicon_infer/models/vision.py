"""The CLIP ViT-H/14 image encoder: sizes, module, preprocessing, pictures to embeddings.

The module is transformers' vision tower without its last layer and its post norm: Wan uses the
state before the last layer, so the rest would be loaded and run for nothing.

There are two schools of preprocessing. Wan was trained on the whole picture squashed to a square
("stretch"); ComfyUI cuts the middle square out ("center"), which loses head and feet of a tall
picture. The recipe chooses.

Shape letters: B pictures, H W pixels, S side of the square in pixels, L tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from xicon_infer.errors import InvalidRequest, MediaError, WeightsError
from xicon_infer.types import UInt8Array

PreprocessMode = Literal["stretch", "center", "comfy_stretch"]
Combine = Literal["average", "concat"]

# OpenAI's statistics of its CLIP training pictures (red, green, blue; 0 to 1).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_KNOWN_HEADS = {1280: 16}
"""Width -> heads of published towers; the number of heads leaves no trace in the shapes."""


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a CLIP vision tower.

    num_layers counts the layers that are run: one fewer than the published tower has.
    image_size and patch_size are sides in pixels.
    """

    width: int
    d_ff: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: Literal["gelu", "quick_gelu"] = "gelu"


CLIP_VIT_H = VisionConfig(
    width=1280, d_ff=5120, num_layers=31, num_heads=16, image_size=224, patch_size=14
)
"""The image encoder of Wan2.1 I2V, SCAIL and SteadyDancer (31 of its 32 layers)."""


def config_from_shapes(
    shapes: Mapping[str, Sequence[int]], *, num_heads: int | None = None
) -> VisionConfig:
    """Returns the sizes that a mapped checkpoint needs.

    Args:
        shapes: tensor name -> shape, as `weights.keymaps_encoders.map_image_encoder` names them.
        num_heads: heads per layer; None looks the width up, which works for ViT-H (1280).

    Raises:
        WeightsError: a tensor that the sizes are read from is missing, or the number of heads
            is neither given nor known.
    """
    try:
        width, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
        num_tokens = shapes["embeddings.position_embedding.weight"][0]
        d_ff = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise WeightsError(
            f"image_encoder: the file has no tensor {error}, so it is no CLIP vision tower; use "
            "clip_vision_h.safetensors",
            field="image_encoder",
        ) from error
    heads = num_heads or _KNOWN_HEADS.get(width)
    if heads is None:
        raise WeightsError(
            f"image_encoder: width {width} belongs to no known tower (known: "
            f"{sorted(_KNOWN_HEADS)}); give num_heads",
            field="image_encoder",
        )
    layers = {int(key.split(".")[2]) for key in shapes if key.startswith("encoder.layers.")}
    return VisionConfig(
        width=width,
        d_ff=d_ff,
        num_layers=len(layers),
        num_heads=heads,
        # One token is the class token, the others form a square.
        image_size=math.isqrt(num_tokens - 1) * patch_size,
        patch_size=patch_size,
    )


def build_image_encoder(config: VisionConfig) -> nn.Module:
    """Returns a CLIP vision tower with no weights loaded, in evaluation mode.

    Under `torch.device("meta")` it costs no memory; then load with `strict=True, assign=True`.

    Args:
        config: the sizes.

    Returns:
        transformers' CLIP vision tower, its names without the prefix `vision_model.` in every
        version of transformers; `last_hidden_state` is the state after the last layer kept.

    Source: huggingface/transformers: models/clip/modeling_clip.py
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            layer_norm_eps=1e-5,
        )
    )
    # transformers 4 wraps the tower in one more module.
    tower: nn.Module = getattr(model, "vision_model", model)
    tower.post_layernorm = nn.Identity()
    # Not part of any checkpoint, so it would stay behind on the meta device.
    num_tokens = (config.image_size // config.patch_size) ** 2 + 1
    tower.get_submodule("embeddings").position_ids = torch.arange(num_tokens, device="cpu")[None]
    return tower.eval().requires_grad_(False)


def preprocess(image: UInt8Array, *, size: int, mode: PreprocessMode) -> torch.Tensor:
    """Returns a picture as the tower takes it.

    Args:
        image: uint8 [H, W, 3] RGB.
        size: S, side of the tower's square, pixels.
        mode: "stretch" squashes the whole picture as Wan does; "center" keeps the aspect ratio,
            smooths, and cuts the middle square as ComfyUI does; "comfy_stretch" squashes with
            ComfyUI's smoothing and rounding (its `crop` switched off).

    Returns:
        float32 [1, 3, S, S], normalised by CLIP's mean and deviation.

    Raises:
        MediaError: the picture is not uint8 [H, W, 3] or has no pixel.
        InvalidRequest: the mode is unknown.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise MediaError(
            f"image: must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}; decode it "
            "to 8-bit RGB first",
            field="image",
        )
    if mode not in get_args(PreprocessMode):
        raise InvalidRequest(
            f"clip_preprocess: {mode!r} is unknown; allowed: {', '.join(get_args(PreprocessMode))}",
            field="clip_preprocess",
            code="INVALID_CHOICE",
        )
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
    if mode == "stretch":
        return stretch(pixels * 2 - 1, size=size)
    return _comfy(pixels, size=size, crop=mode == "center")


def stretch(image: torch.Tensor, *, size: int) -> torch.Tensor:
    """Returns pictures squashed to the tower's square as Wan does, without smoothing.

    Args:
        image: float [B, 3, H, W], -1 to 1; for callers whose picture is no longer 8-bit.
        size: S, side of the square, pixels.

    Returns:
        float32 [B, 3, S, S], normalised.

    Source: Wan-Video/Wan2.1: wan/modules/clip.py, CLIPModel.visual
    """
    image = functional.interpolate(
        image.float(), size=(size, size), mode="bicubic", align_corners=False
    )
    return _normalise((image + 1) / 2)


def _comfy(pixels: torch.Tensor, *, size: int, crop: bool) -> torch.Tensor:
    """Returns pictures prepared as ComfyUI does.

    Args:
        pixels: float32 [B, 3, H, W], 0 to 1.
        size: S, side of the square, pixels.
        crop: whether to cut the middle square out of the picture instead of squashing it.

    Source: Comfy-Org/ComfyUI: comfy/clip_vision.py, clip_preprocess
    """
    height, width = pixels.shape[2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        target = (round(scale * height), round(scale * width)) if crop else (size, size)
        pixels = functional.interpolate(pixels, size=target, mode="bicubic", antialias=True)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        pixels = pixels[:, :, top : top + size, left : left + size]
    # Bicubic overshoots; ComfyUI goes back to 8-bit levels here.
    return _normalise((pixels * 255).clamp(0, 255).round() / 255)


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Returns [B, 3, S, S] pixels (0 to 1) less CLIP's mean, in units of its deviation."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std


@torch.no_grad()
def encode_pixels(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns the tower's embeddings of preprocessed pictures.

    Args:
        model: from `build_image_encoder`, weights loaded.
        pixel_values: float [B, 3, S, S], normalised.

    Returns:
        [B, L, C] in the model's dtype, on its device; the class token comes first.
    """
    weight = model.get_parameter("embeddings.patch_embedding.weight")
    # The counter is on the CPU when the weights were assigned rather than moved.
    position_ids = model.get_buffer("embeddings.position_ids").to(weight.device)
    model.get_submodule("embeddings").position_ids = position_ids
    pixel_values = pixel_values.to(weight.device, weight.dtype)
    return model(pixel_values=pixel_values).last_hidden_state


def encode_image(
    model: nn.Module,
    images: list[UInt8Array],
    mode: PreprocessMode,
    *,
    strength: float = 1.0,
    combine: Combine = "average",
) -> torch.Tensor:
    """Returns one embedding for one or more pictures.

    Args:
        model: from `build_image_encoder`, weights loaded.
        images: B pictures, uint8 [H, W, 3] RGB, of any sizes.
        mode: how each is brought to the tower's square; see `preprocess`.
        strength: factor of the embedding.
        combine: "average" of the pictures, or "concat" one after the other.

    Returns:
        [1, L, C] (average) or [1, B * L, C] (concat), in the model's dtype.

    Raises:
        InvalidRequest: there is no picture, or mode or combine is unknown.
        MediaError: a picture is not uint8 [H, W, 3].

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes.py, WanVideoClipVisionEncode. Differs
        from it: one strength for all pictures.
    """
    if not images:
        raise InvalidRequest("image: at least one is needed, got none", field="image")
    if combine not in get_args(Combine):
        raise InvalidRequest(
            f"combine: {combine!r} is unknown; allowed: {', '.join(get_args(Combine))}",
            field="combine",
            code="INVALID_CHOICE",
        )
    size = _image_size(model)
    batch = torch.cat([preprocess(image, size=size, mode=mode) for image in images])
    embeds = encode_pixels(model, batch) * strength
    if combine == "average":
        return embeds.mean(dim=0, keepdim=True)
    return embeds.flatten(0, 1)[None]


def _image_size(model: nn.Module) -> int:
    """Returns the side of the tower's square, pixels; one token is the class token."""
    num_tokens = model.get_parameter("embeddings.position_embedding.weight").shape[0]
    patch_size = model.get_parameter("embeddings.patch_embedding.weight").shape[-1]
    return math.isqrt(num_tokens - 1) * patch_size
