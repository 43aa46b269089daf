"""Pictures: reading one as plain RGB, and bringing pictures to a size.

What leaves here is uint8 [H, W, 3] in sRGB: orientation applied, transparency laid over white.
Resizing follows ImageResizeKJv2 to the pixel, because the models of the original graphs saw its
output. Shape letters: F frames, H height, W width.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps

from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.resample import interpolate
from xicon_infer.media.source import (
    DEFAULT_LIMITS,
    IMAGE_KINDS,
    MediaLimits,
    display_name,
    read_head,
    refuse,
    sniff,
)
from xicon_infer.types import FITS, Fit, UInt8Array

Position = Literal["center", "top", "bottom", "left", "right"]
"""Which part of a picture a crop keeps, or where a padded picture stands."""
POSITIONS: tuple[Position, ...] = ("center", "top", "bottom", "left", "right")

Method = Literal["lanczos", "bicubic", "bilinear", "area", "nearest"]
METHODS: tuple[Method, ...] = ("lanczos", "bicubic", "bilinear", "area", "nearest")

# What Pillow and its plugins raise on damaged files.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


_JPEG_SCAN = b"\xff\xda"
_MAX_JPEG_SCANS = 200
"""Encoders write about ten; a megabyte can hold thousands, which take hours."""


@dataclass(frozen=True)
class Sizing:
    """The size that pictures are brought to, and how; see `resize_frames`."""

    width: int
    height: int
    fit: Fit = "crop"
    position: Position = "center"
    divisible_by: int = 1
    method: Method = "lanczos"


@dataclass(frozen=True)
class _Plan:
    """Where pixels come from and go to.

    box: the part cut out (left, top, right, bottom). width, height: what it is resized to.
    border: what is added around that (left, top, right, bottom).
    """

    box: tuple[int, int, int, int]
    width: int
    height: int
    border: tuple[int, int, int, int] = (0, 0, 0, 0)


def load_image(
    path: Path | str, *, limits: MediaLimits = DEFAULT_LIMITS, field: str = "image"
) -> UInt8Array:
    """Returns a picture as sRGB, turned upright, transparency laid over white.

    Args:
        path: a JPEG, PNG, WebP, BMP or GIF file, recognised by its content; of an animation the
            first frame is taken.
        limits: max_image_bytes and max_image_pixels apply; the pixels are read from the header,
            before anything is decoded.
        field: the request field that named the file, for messages.

    Returns:
        uint8 [H, W, 3].

    Raises:
        MediaError: MEDIA_NOT_FOUND, UNSUPPORTED_MEDIA, MEDIA_TOO_LARGE or MEDIA_CORRUPT.
    """
    with open_image(path, limits=limits, field=field) as image:
        return np.array(_plain_rgb(image))


@contextmanager
def open_image(
    path: Path | str, *, limits: MediaLimits = DEFAULT_LIMITS, field: str = "image"
) -> Iterator[Image.Image]:
    """Yields an opened picture of which nothing is decoded yet; see `load_image`.

    Raises:
        MediaError: as `load_image`, also for damage that is met while it is used.
    """
    kind = sniff(read_head(path, max_bytes=limits.max_image_bytes, field=field))
    if kind not in IMAGE_KINDS:
        refuse(path, kind, allowed="JPEG, PNG, WebP, BMP, GIF", field=field)
    try:
        if kind == "JPEG" and Path(path).read_bytes().count(_JPEG_SCAN) > _MAX_JPEG_SCANS:
            raise ValueError("each of its scans makes the decoder pass over all pixels")
        with warnings.catch_warnings():
            # Damaged side information and large sizes; both are judged here instead.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=[kind]) as image:
                _check_pixels(image, path, limits, field)
                yield image
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(path, "far too many", limits, field) from error
    except _DAMAGE as error:
        raise MediaError(
            f"'{field}': {display_name(path)} is a damaged {kind} picture; open it in a picture "
            "editor and save it again, or send another one",
            field=field,
            code="MEDIA_CORRUPT",
        ) from error


def resized_size(
    width: int,
    height: int,
    *,
    target_width: int,
    target_height: int,
    fit: Fit,
    divisible_by: int,
    field: str = "image",
) -> tuple[int, int]:
    """Returns (width, height) that `resize_frames` makes of a picture of width x height.

    Raises:
        MediaError: UNSUPPORTED_MEDIA where a side would become 0.
    """
    sizing = Sizing(target_width, target_height, fit, divisible_by=divisible_by)
    plan = _plan(width, height, sizing, field)
    left, top, right, bottom = plan.border
    return plan.width + left + right, plan.height + top + bottom


def resize_frames(
    frames: UInt8Array,
    *,
    width: int,
    height: int,
    fit: Fit,
    position: Position = "center",
    divisible_by: int = 1,
    method: Method = "lanczos",
    pad_color: tuple[int, int, int] = (255, 255, 255),
) -> UInt8Array:
    """Returns pictures brought to a size.

    Args:
        frames: uint8 [F, H, W, 3], or one picture [H, W, 3].
        width: wanted width in pixels; 0 = as the height asks for ("resize", "pad") or unchanged.
        height: wanted height in pixels; 0 likewise.
        fit: "crop" covers the size and cuts what is over; "resize" fits inside and may end
            smaller; "stretch" distorts; "pad" fits inside and fills the rest.
        position: the part "crop" keeps, or where "pad" puts the picture.
        divisible_by: both sides are made smaller to a multiple of this ("pad": larger again).
        method: how pixels are computed; "lanczos" smooths when shrinking.
        pad_color: red, green, blue, 0 to 255, of the filled part.

    Returns:
        uint8, as many axes as `frames`.

    Raises:
        MediaError: UNSUPPORTED_MEDIA where a side would become 0.
        InvalidRequest: an option is unknown or out of range.

    Source: kijai/ComfyUI-KJNodes: nodes/image_nodes.py ImageResizeKJv2 and ImagePadKJ
    """
    single = frames.ndim == 3
    stack = frames[None] if single else frames
    sizing = Sizing(width, height, fit, position, divisible_by, method)
    plan = _plan(stack.shape[2], stack.shape[1], sizing, "image")
    left, top, right, bottom = plan.border
    shape = (len(stack), plan.height + top + bottom, plan.width + left + right, 3)
    resized = np.empty(shape, np.uint8)
    resized[:] = np.asarray(pad_color, np.uint8)
    inner = resized[:, top : top + plan.height, left : left + plan.width]
    for index, frame in enumerate(stack):
        inner[index] = _resize_one(frame, plan, method)
    return resized[0] if single else resized


def fit_frame(frame: UInt8Array, sizing: Sizing) -> UInt8Array:
    """Returns one picture [H, W, 3] brought to `sizing`; filled parts are white."""
    return resize_frames(
        frame,
        width=sizing.width,
        height=sizing.height,
        fit=sizing.fit,
        position=sizing.position,
        divisible_by=sizing.divisible_by,
        method=sizing.method,
    )


def _check_pixels(image: Image.Image, path: Path | str, limits: MediaLimits, field: str) -> None:
    if image.width * image.height > limits.max_image_pixels:
        raise _too_many_pixels(path, f"{image.width}x{image.height}", limits, field)


def _too_many_pixels(path: Path | str, size: str, limits: MediaLimits, field: str) -> MediaError:
    megapixels = limits.max_image_pixels / 1e6
    return MediaError(
        f"'{field}': {display_name(path)} has {size} pixels, at most {megapixels:g} megapixels "
        "are allowed; make it smaller",
        field=field,
        code="MEDIA_TOO_LARGE",
    )


def _plain_rgb(image: Image.Image) -> Image.Image:
    """Returns an opened picture decoded, as upright sRGB over white."""
    profile = image.info.get("icc_profile")
    image.load()
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        colours = _to_srgb(image.convert("RGB"), profile)
        colours.putalpha(alpha)
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _to_srgb(image, profile)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE:
        # A damaged EXIF block says nothing about the pixels, and most viewers ignore it.
        return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Returns "L" of a picture with 16 bits a pixel, scaled (convert would clip at 255)."""
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.rint(np.clip(values / 257, 0, 255)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Returns "RGB" in sRGB; an unusable or foreign profile is passed over.

    A profile that is sRGB already is not applied: the detour would change pixels by one level.
    """
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert("RGB")
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, *_DAMAGE):
        converted = None
    return converted or image.convert("RGB")


def _resize_one(frame: UInt8Array, plan: _Plan, method: Method) -> UInt8Array:
    left, top, right, bottom = plan.box
    cut = frame[top:bottom, left:right]
    if method != "lanczos":
        return interpolate(cut, plan.width, plan.height, method)
    picture = Image.fromarray(np.ascontiguousarray(cut))
    return np.asarray(picture.resize((plan.width, plan.height), Image.Resampling.LANCZOS))


def _plan(width: int, height: int, sizing: Sizing, field: str) -> _Plan:
    _check_options(sizing)
    if sizing.fit in ("resize", "pad"):
        inner = _inside(width, height, sizing)
    else:
        inner = sizing.width or width, sizing.height or height
    divisor = max(sizing.divisible_by, 1)
    new_width, new_height = (side - side % divisor for side in inner)
    if min(new_width, new_height) < 1:
        raise MediaError(
            f"'{field}': a picture of {width}x{height} cannot be brought to "
            f"{sizing.width}x{sizing.height} with fit '{sizing.fit}' and sides divisible by "
            f"{divisor}: one side would be 0. Use fit 'crop', or a larger size",
            field=field,
            code="UNSUPPORTED_MEDIA",
        )
    box = (0, 0, width, height)
    if sizing.fit == "crop":
        box = _crop_box(width, height, new_width / new_height, sizing.position)
    border = (0, 0, 0, 0)
    if sizing.fit == "pad":
        border = _borders(inner, (new_width, new_height), sizing)
    return _Plan(box, new_width, new_height, border)


def _check_options(sizing: Sizing) -> None:
    choices = (
        ("fit", sizing.fit, FITS),
        ("position", sizing.position, POSITIONS),
        ("method", sizing.method, METHODS),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            listed = ", ".join(allowed)
            raise InvalidRequest(f"'{name}' must be one of {listed}, got {value!r}", field=name)
    for name in ("width", "height", "divisible_by"):
        if getattr(sizing, name) < 0:
            value = getattr(sizing, name)
            raise InvalidRequest(f"'{name}' must be 0 or above, got {value}", field=name)


def _inside(width: int, height: int, sizing: Sizing) -> tuple[int, int]:
    """Returns the size of the picture fitted into the target, aspect kept."""
    if not sizing.width and not sizing.height:
        return width, height
    if not sizing.width:
        return round(width * (sizing.height / height)), sizing.height
    if not sizing.height:
        return sizing.width, round(height * (sizing.width / width))
    ratio = min(sizing.width / width, sizing.height / height)
    return round(width * ratio), round(height * ratio)


def _crop_box(
    width: int, height: int, aspect: float, position: Position
) -> tuple[int, int, int, int]:
    """Returns the largest box of that aspect (width / height) at that position."""
    if width / height > aspect:
        box_width, box_height = max(1, round(height * aspect)), height
    else:
        box_width, box_height = width, max(1, round(width / aspect))
    left, top = _offset(width - box_width, height - box_height, position)
    return left, top, left + box_width, top + box_height


def _borders(
    inner: tuple[int, int], floored: tuple[int, int], sizing: Sizing
) -> tuple[int, int, int, int]:
    """Returns left, top, right, bottom pixels to fill.

    What flooring to the divisor took from the picture is given back at the right and bottom.
    """
    spare_x, spare_y = sizing.width - inner[0], sizing.height - inner[1]
    if max(spare_x, spare_y) <= 0:
        return 0, 0, 0, 0
    left, top = _offset(spare_x, spare_y, sizing.position)
    divisor = max(sizing.divisible_by, 1)
    right = spare_x - left + -(floored[0] + spare_x) % divisor
    bottom = spare_y - top + -(floored[1] + spare_y) % divisor
    return left, top, right, bottom


def _offset(spare_x: int, spare_y: int, position: Position) -> tuple[int, int]:
    """Returns where a box stands when so many pixels are left over on each axis."""
    left = {"left": 0, "right": spare_x}.get(position, spare_x // 2)
    top = {"top": 0, "bottom": spare_y}.get(position, spare_y // 2)
    return left, top
