"""The only conversions between 8-bit frames and the range of the model, [-1, 1].

F frames, H W pixels, B batch (1 here). Frames are uint8 [F, H, W, 3] RGB; a model video is
[1, 3, F, H, W]. All arithmetic is float32 whatever the dtype of the model. A long video may be
converted in chunks of frames: the result is the same (for "minmax", give `value_range`).
"""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from xicon_infer.errors import InvalidRequest
from xicon_infer.types import UInt8Array

Normalization = Literal["default", "minmax", "none"]
NORMALIZATIONS: tuple[Normalization, ...] = ("default", "minmax", "none")


def frames_to_model(
    frames: UInt8Array | Tensor,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns frames as a model video: x / 127.5 - 1.

    The bytes are moved to the device before they grow.

    Args:
        frames: [F, H, W, 3] uint8 RGB, array or tensor.
        device: of the result.
        dtype: of the result; computed in float32.

    Returns:
        [1, 3, F, H, W] in [-1, 1], channels last in memory.

    Raises:
        InvalidRequest: when the frames have another type or shape.
    """
    if isinstance(frames, Tensor):
        data = frames
    else:
        # torch warns about arrays that cannot be written, such as decoded frames: copy those.
        data = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
    if data.dtype != torch.uint8 or data.ndim != 4 or data.shape[3] != 3:
        raise InvalidRequest(
            f"frames are {data.dtype} {tuple(data.shape)}; wanted uint8 [F, H, W, 3].",
            field="frames",
        )
    video = data.to(device).to(torch.float32).div_(127.5).sub_(1)
    return video.to(dtype).permute(3, 0, 1, 2).unsqueeze(0)


def model_to_frames(
    video: Tensor,
    normalization: Normalization = "default",
    value_range: tuple[float, float] | None = None,
) -> UInt8Array:
    """Returns what `model_to_bytes` does as an array on the host, uint8 [F, H, W, 3]."""
    return model_to_bytes(video, normalization, value_range).cpu().numpy()


def model_to_bytes(
    video: Tensor,
    normalization: Normalization = "default",
    value_range: tuple[float, float] | None = None,
) -> Tensor:
    """Returns a model video as 8-bit frames on its device: trunc(v * 255 + 0.5), v in [0, 1].

    Args:
        video: [1, 3, F, H, W], any float dtype and device.
        normalization: how v is made. "default": (x clamped to [-1, 1] + 1) / 2. "minmax":
            (x - min) / (max - min), for a constant video 0. "none": x clamped to [0, 1].
        value_range: (min, max) for "minmax"; None takes those of this tensor, which is right only
            if it holds the whole video. Ignored by the others.

    Returns:
        [F, H, W, 3] uint8 RGB.

    Raises:
        InvalidRequest: when the shape or the normalization is unknown.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes.py, WanVideoDecode (range), and
    Kosinkadink/ComfyUI-VideoHelperSuite (rounding).
    """
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise InvalidRequest(
            f"video has shape {tuple(video.shape)}; wanted [1, 3, F, H, W].", field="video"
        )
    # Rearranged in its own dtype, then one float32 copy that is changed in place.
    values = video[0].permute(1, 2, 3, 0).to(torch.float32, copy=True)
    if normalization == "default":
        values.clamp_(-1, 1).add_(1).div_(2)
    elif normalization == "minmax":
        low, high = value_range or (values.min().item(), values.max().item())
        values.sub_(low).div_(max(high - low, torch.finfo(torch.float32).tiny))
    elif normalization != "none":
        raise InvalidRequest(
            f"normalization is {normalization!r}; allowed: {', '.join(NORMALIZATIONS)}.",
            field="normalization",
        )
    # The conversion to uint8 truncates.
    return values.clamp_(0, 1).mul_(255).add_(0.5).to(torch.uint8).contiguous()


@overload
def half_size(frames: UInt8Array) -> UInt8Array: ...


@overload
def half_size(frames: Tensor) -> Tensor: ...


def half_size(frames: UInt8Array | Tensor) -> UInt8Array | Tensor:
    """Returns frames at half height and width: the mean of every 2 x 2 pixels.

    Args:
        frames: a uint8 array [F, H, W, 3], or a float tensor [..., H, W]; H and W even.

    Returns:
        A uint8 array [F, H/2, W/2, 3], means rounded half up; or a tensor [..., H/2, W/2] of the
        same dtype, averaged in float32 at least.

    Raises:
        InvalidRequest: when H or W is odd, or a tensor is not of a float type.
    """
    if isinstance(frames, Tensor) and not frames.is_floating_point():
        raise InvalidRequest(
            f"frames are a {frames.dtype} tensor; wanted a float one or a uint8 array.",
            field="frames",
        )
    height, width = frames.shape[-2:] if isinstance(frames, Tensor) else frames.shape[1:3]
    if height % 2 or width % 2:
        raise InvalidRequest(
            f"frames are {height} high and {width} wide; both must be even to halve them.",
            field="frames",
        )
    if isinstance(frames, Tensor):
        wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
        pairs = wide[..., ::2, :] + wide[..., 1::2, :]
        return ((pairs[..., ::2] + pairs[..., 1::2]) / 4).to(frames.dtype)
    sums = frames[:, ::2].astype(np.uint16) + frames[:, 1::2]
    return ((sums[:, :, ::2] + sums[:, :, 1::2] + 2) // 4).astype(np.uint8)
