"""Heatmaps to keypoints: the sub-cell position of every peak, then its place in the frame.

The default, "dark", follows the graphs this project reproduces. ViTPose was trained with the "udp"
convention; the two agree at the top left of a crop and differ by one heatmap cell at the bottom
right. All maps are decoded at once, on their device. The arithmetic is float64: on a noisy map the
step is a quotient of two small differences.

Shape letters: N crops, K keypoints, H W of a heatmap.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from xicon_infer.errors import InvalidRequest

Decode = Literal["dark", "udp"]
DECODES: tuple[Decode, ...] = ("dark", "udp")

# OpenCV's sigma for a Gaussian of 11 taps: 0.3 ((11 - 1) / 2 - 1) + 0.8.
_BLUR_TAPS = 11
_BLUR_SIGMA = 2.0
# Below these a heatmap is taken as empty; they keep the logarithm finite.
_DARK_FLOOR = 1e-10
_UDP_FLOOR, _UDP_CEILING = 1e-3, 50.0


def decode_heatmaps(
    heatmaps: Tensor,
    centers: Tensor,
    sizes: Tensor,
    *,
    decode: Decode = "dark",
    clamp_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the keypoints of every crop and their scores.

    Args:
        heatmaps: [N, K, H, W] float, as the network gives them.
        centers: [N, 2] float64, x and y of the middle of each crop, pixels of the frame.
        sizes: [N, 2] float64, width and height of each crop before rounding, pixels.
        decode: "dark" places cell i at i / W of the crop, "udp" at i / (W - 1).
        clamp_offset: keep a point within one cell of its peak; on noise it may run farther.

    Returns:
        keypoints float32 [N, K, 2], pixels; scores float32 [N, K], the raw peaks. A map without
        a positive value puts its point one cell above and left of the crop.

    Raises:
        InvalidRequest: if `decode` is unknown.

    Source: kijai/ComfyUI-WanAnimatePreprocess: pose_utils/pose2d_utils.py ("dark");
    open-mmlab/mmpose, arXiv:1911.07524, and JunkyByte/easy_ViTPose ("udp").
    """
    if decode not in DECODES:
        raise InvalidRequest(
            f"decode is {decode!r}; allowed: {', '.join(DECODES)}.", field="decode"
        )
    heatmaps = heatmaps.double()
    height, width = heatmaps.shape[2:]
    scores, peaks = find_peaks(heatmaps)
    offsets = _dark_offsets(heatmaps, peaks) if decode == "dark" else _udp_offsets(heatmaps, peaks)
    offsets = offsets * (scores > 0).unsqueeze(-1)
    if clamp_offset:
        offsets = offsets.clamp(-1, 1)
    last = 0 if decode == "dark" else 1
    cells = torch.tensor([width - last, height - last], dtype=sizes.dtype, device=sizes.device)
    sizes, corner = sizes[:, None], (centers - sizes / 2)[:, None]
    keypoints = (peaks + offsets) * (sizes / cells) + corner
    return keypoints.float(), scores.float()


def find_peaks(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the highest value of each map and its cell.

    Args:
        heatmaps: [N, K, H, W] float64.

    Returns:
        scores [N, K]; peaks [N, K, 2] float64 whole numbers x, y, both -1 where the score is not
        above 0.
    """
    width = heatmaps.shape[3]
    scores, where = heatmaps.flatten(2).max(dim=2)
    peaks = torch.stack([where % width, where // width], dim=-1).double()
    return scores, torch.where((scores > 0).unsqueeze(-1), peaks, -1.0)


def _dark_offsets(heatmaps: Tensor, peaks: Tensor) -> Tensor:
    """Returns offsets [N, K, 2] in cells: a Newton step on the logarithm of the blurred map."""
    height, width = heatmaps.shape[2:]
    blurred = _blur(heatmaps, reflect=False)
    # Scaled so that the highest value stays what it was; the floor below depends on it.
    gain = heatmaps.amax(dim=(2, 3)) / blurred.amax(dim=(2, 3)).clamp_min(1e-30)
    x, y = peaks.long().unbind(-1)
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    x, y = x.clamp(2, width - 3), y.clamp(2, height - 3)

    def log(right: int, down: int) -> Tensor:
        value = _at(blurred, x + right, y + down) * gain
        return value.clamp_min(_DARK_FLOOR).log()

    middle = log(0, 0)
    gradient = torch.stack([log(1, 0) - log(-1, 0), log(0, 1) - log(0, -1)], dim=-1) / 2
    dxx = (log(2, 0) - 2 * middle + log(-2, 0)) / 4
    dyy = (log(0, 2) - 2 * middle + log(0, -2)) / 4
    dxy = (log(1, 1) - log(1, -1) - log(-1, 1) + log(-1, -1)) / 4
    return _newton_step(gradient, dxx, dyy, dxy) * inside.unsqueeze(-1)


def _udp_offsets(heatmaps: Tensor, peaks: Tensor) -> Tensor:
    """Returns offsets [N, K, 2] in cells as UDP takes them: a 3 x 3 neighbourhood, any place."""
    height, width = heatmaps.shape[2:]
    blurred = _blur(heatmaps, reflect=True).clamp(_UDP_FLOOR, _UDP_CEILING).log()
    x, y = peaks.long().unbind(-1)

    def log(right: int, down: int) -> Tensor:
        # The map is continued by its border.
        return _at(blurred, (x + right).clamp(0, width - 1), (y + down).clamp(0, height - 1))

    middle, left, right, up, down = log(0, 0), log(-1, 0), log(1, 0), log(0, -1), log(0, 1)
    gradient = torch.stack([right - left, down - up], dim=-1) / 2
    dxx, dyy = right - 2 * middle + left, down - 2 * middle + up
    dxy = (log(1, 1) - right - down + 2 * middle - left - up + log(-1, -1)) / 2
    return _newton_step(gradient, dxx, dyy, dxy)


def _newton_step(gradient: Tensor, dxx: Tensor, dyy: Tensor, dxy: Tensor) -> Tensor:
    """Returns -Hessian^-1 gradient, zero where the Hessian cannot be inverted."""
    dx, dy = gradient.unbind(-1)
    determinant = dxx * dyy - dxy * dxy
    regular = determinant != 0
    determinant = torch.where(regular, determinant, 1.0)
    step = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], dim=-1)
    return torch.where(regular.unsqueeze(-1), step / determinant.unsqueeze(-1), 0.0)


def _blur(heatmaps: Tensor, *, reflect: bool) -> Tensor:
    """Returns the maps blurred; outside of them lie zeros, or the map mirrored at its border.

    Two matrix products, which for maps this small are quicker than convolutions.
    """
    height, width = heatmaps.shape[2:]
    rows = _band(height, reflect=reflect).to(heatmaps.device)
    columns = _band(width, reflect=reflect).to(heatmaps.device)
    return rows @ (heatmaps @ columns.T)


def _band(length: int, *, reflect: bool) -> Tensor:
    """Returns the blur along one axis as a matrix [length, length], float64."""
    half = _BLUR_TAPS // 2
    taps = torch.arange(-half, half + 1, dtype=torch.float64)
    kernel = torch.exp(-taps.square() / (2 * _BLUR_SIGMA**2))
    kernel = kernel / kernel.sum()
    spread = torch.eye(length, dtype=torch.float64).unsqueeze(1)
    spread = pad(spread, (half, half), mode="reflect" if reflect else "constant")
    windows = spread.squeeze(1).unfold(1, _BLUR_TAPS, 1)
    return torch.einsum("iok,k->oi", windows, kernel)


def _at(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Returns the value of each map [N, K, H, W] at its own cell [N, K]."""
    index = y * maps.shape[3] + x
    return maps.flatten(2).gather(2, index.unsqueeze(-1)).squeeze(-1)
