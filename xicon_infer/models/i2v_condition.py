"""What an image-to-video model is given beside the noise: 4 mask and 16 image latent channels.

F pixel frames (4n + 1), T latent frames, H W pixels, h w latent cells. Images are tensors
[3, n, H, W] in [-1, 1], already of the size of the video. The VAE is a callable, so that tiling,
caching and fakes are the caller's business.

An end image can stand in the video in two ways. `flf2v` (first-last-frame models): it is the last
of the F frames. Otherwise: it follows the F frames as a clip of its own and gives one more latent
frame, which is dropped before decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xicon_infer.errors import InvalidRequest
from xicon_infer.types import SPATIAL_STRIDE, TEMPORAL_STRIDE, latent_frames, pixel_frames

Encode = Callable[[Tensor], Tensor]
"""Video [1, 3, F, H, W] in [-1, 1] -> normalised latents [1, 16, T, h, w]."""


@dataclass(frozen=True, eq=False)
class I2VImages:
    """The pictures a video starts and ends with.

    start: [3, n, H, W] in [-1, 1], one frame or several, or None. end: [3, m, H, W], or None.
    flf2v: the layout of the end image, see the module; with no start image it is always used.

    Raises:
        InvalidRequest: when both images are missing, sizes differ, or an end image of its own
            comes with more than one frame on either side.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    flf2v: bool = True

    def __post_init__(self) -> None:
        given = [image for image in (self.start, self.end) if image is not None]
        if not given:
            raise InvalidRequest("start and end are None; give one of them.", field="start")
        sizes = {tuple(image.shape[2:]) for image in given}
        if len(sizes) > 1 or any(image.ndim != 4 or image.shape[0] != 3 for image in given):
            shapes = [tuple(image.shape) for image in given]
            raise InvalidRequest(
                f"images have shapes {shapes}; wanted [3, n, H, W] of one size.", field="start"
            )
        if self.end_apart and self.counts != (1, 1):
            raise InvalidRequest(
                f"start and end have {self.counts} frames; without flf2v each must be 1.",
                field="flf2v",
            )

    @property
    def end_apart(self) -> bool:
        """Returns True if the end image is encoded as a clip of its own."""
        return self.start is not None and self.end is not None and not self.flf2v

    @property
    def counts(self) -> tuple[int, int]:
        """Returns the frames of the start and of the end."""
        start, end = (0 if image is None else image.shape[1] for image in (self.start, self.end))
        return start, end

    @property
    def size(self) -> tuple[int, int]:
        """Returns (H, W) in pixels."""
        image = self.start if self.start is not None else self.end
        assert image is not None
        return image.shape[2], image.shape[3]


def condition_video(images: I2VImages, num_frames: int) -> Tensor:
    """Returns the video that the VAE encodes: the images, and mid-grey (0) where there is none.

    Args:
        images: the start and the end.
        num_frames: F; rounded down to 4n + 1.

    Returns:
        [3, F, H, W], dtype and device of the images; [3, F + 1, H, W] if the end stands apart.

    Raises:
        InvalidRequest: when the images are more than the frames.
    """
    total = _total_frames(images, num_frames)
    given = images.start if images.start is not None else images.end
    assert given is not None
    video = given.new_zeros(3, total, *images.size)
    start, end = images.counts
    if images.start is not None:
        video[:, :start] = images.start
    if images.end is not None:
        video[:, total - end :] = images.end
    return video


def condition_mask(images: I2VImages, num_frames: int) -> Tensor:
    """Returns which pixel frames are given, four of them per latent frame.

    Latent frame 0 stands for one pixel frame, which fills its four channels; so does an end image
    that stands apart.

    Args:
        images: the start and the end.
        num_frames: F; rounded down to 4n + 1.

    Returns:
        [4, T, h, w] float32, 1 for given and 0 for grey; [4, T + 1, h, w] if the end stands apart.

    Raises:
        InvalidRequest: when the images are more than the frames.

    Source: Wan-Video/Wan2.1: wan/image2video.py; for the end image
    rookiestar28/ComfyUI-WanVideoWrapper: nodes.py, WanVideoImageToVideoEncode.
    """
    total = _total_frames(images, num_frames)
    given = torch.zeros(total)
    start, end = images.counts
    given[:start] = 1
    given[total - end :] = 1
    repeats = torch.ones(total, dtype=torch.int64)
    repeats[0] = TEMPORAL_STRIDE
    if images.end_apart:
        repeats[-1] = TEMPORAL_STRIDE
    mask = given.repeat_interleave(repeats).view(-1, TEMPORAL_STRIDE).T
    height, width = (side // SPATIAL_STRIDE for side in images.size)
    return mask[:, :, None, None].repeat(1, 1, height, width)


def build_condition(
    encode: Encode,
    images: I2VImages,
    num_frames: int,
    *,
    start_strength: float = 1.0,
    end_strength: float = 1.0,
    look_back: int | None = None,
) -> Tensor:
    """Returns the condition that is appended to the noise: mask, then image latents.

    Args:
        encode: the VAE, mean and standard deviation applied.
        images: the start and the end.
        num_frames: F; rounded down to 4n + 1.
        start_strength: factor of the first latent frame, 0 or more.
        end_strength: factor of the last latent frame, whether there is an end image or not.
        look_back: pixel frames that a latent can depend on (`VAEConfig.look_back`, 112). If given,
            the grey tail is encoded only until it repeats itself, which is exact.

    Returns:
        [20, T, h, w], dtype and device of the latents; T + 1 if the end stands apart.

    Raises:
        InvalidRequest: when the images are more than the frames.
    """
    latents = _encode_images(encode, images, num_frames, look_back).clone()
    latents[:, :1] *= start_strength
    latents[:, -1:] *= end_strength
    mask = condition_mask(images, num_frames).to(latents)
    return torch.cat([mask, latents])


def _encode_images(
    encode: Encode, images: I2VImages, num_frames: int, look_back: int | None
) -> Tensor:
    """Returns the latents [16, T, h, w] of the images and the grey between them."""
    if images.end is None and look_back is not None:
        wanted = latent_frames(num_frames)
        # The first latent frame that sees nothing but grey; all after it are equal to it.
        steady = -(-(images.counts[0] + look_back) // TEMPORAL_STRIDE)
        if steady + 1 < wanted:
            latents = encode(condition_video(images, pixel_frames(steady + 1))[None])[0]
            return torch.cat([latents, latents[:, -1:].expand(-1, wanted - steady - 1, -1, -1)], 1)
    video = condition_video(images, num_frames)[None]
    if not images.end_apart:
        return encode(video)[0]
    return torch.cat([encode(video[:, :, :-1])[0], encode(video[:, :, -1:])[0]], dim=1)


def _total_frames(images: I2VImages, num_frames: int) -> int:
    """Returns the frames of the pixel video: 4n + 1, one more if the end stands apart."""
    total = pixel_frames(latent_frames(num_frames)) + images.end_apart
    if num_frames < 1 or sum(images.counts) > total:
        raise InvalidRequest(
            f"num_frames is {num_frames}; allowed: enough for the {sum(images.counts)} given "
            "frames, after rounding down to 4n + 1.",
            field="num_frames",
        )
    return total
