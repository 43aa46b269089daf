"""Work and size of the networks that find poses, and of drawing one, as closed forms.

FLOP are 2 x multiply-adds. What is not a closed form is a count published for the network or made
on its architecture, with its source. The work of RTMW3D is not known and therefore not counted.

Shape letters: L tokens, D model width.

Source: THU-MIG/yolov10: README.md (yolov10m); ViTAE-Transformer/ViTPose: configs (widths, layers)
"""

from __future__ import annotations

from dataclasses import dataclass

YOLO_FLOPS = 59_000_000_000
"""YOLOv10m, one frame of 640 x 640; published as 59.1 GF."""
YOLO_PARAMETERS = 15_400_000

YOLOX_FLOPS = 155_600_000_000
"""YOLOX-l, one frame of 640 x 640 (Megvii-BaseDetection/YOLOX: README.md)."""
YOLOX_PARAMETERS = 54_200_000

DWPOSE_FLOPS = 20_200_000_000
"""DWPose-l at 384 x 288, one person: 10.1 G multiply-adds (IDEA-Research/DWPose: README.md)."""
DWPOSE_PARAMETERS = 33_600_000
"""From the size of the published file, 134 MB in float32."""

NLF_FLOPS = 72_000_000_000
"""The crop network of NLF-L (EfficientNetV2-L), one person of 384 x 384, without its own head."""
NLF_PARAMETERS = 120_000_000

NLF_DETECTOR_FLOPS = 260_000_000_000
"""The detector inside the NLF file, one frame; not run where boxes are given."""

_CROP_TOKENS = (256 // 16) * (192 // 16)
_HEAD_FLOPS = 4_000_000_000
_CAPSULES = 13
_CAPSULE_FLOPS = 60
"""Per pixel; the intersection of a ray and a capsule, with its shading."""


@dataclass(frozen=True)
class VitShape:
    """Size of a ViTPose backbone, and the parameters of the whole network."""

    dim: int
    layers: int
    parameters: int


VITPOSE = {
    "vitpose-h": VitShape(1280, 32, 637_000_000),
    "vitpose-l": VitShape(1024, 24, 309_000_000),
}


def detector_cost(name: str) -> tuple[int, int]:
    """Returns FLOP of one frame, and parameters, of a built-in detector.

    Args:
        name: "yolov10m" or "yolox".
    """
    if name == "yolox":
        return YOLOX_FLOPS, YOLOX_PARAMETERS
    return YOLO_FLOPS, YOLO_PARAMETERS


def keypoint_cost(name: str) -> tuple[int, int]:
    """Returns FLOP of one person's crop, and parameters, of a keypoint network.

    Args:
        name: "vitpose-h", "vitpose-l" or "dwpose".
    """
    if name == "dwpose":
        return DWPOSE_FLOPS, DWPOSE_PARAMETERS
    return vitpose_flops(name), VITPOSE[name].parameters


def vitpose_flops(name: str) -> int:
    """Returns FLOP of one person's crop: 24 L D^2 + 4 L^2 D a layer, and the head.

    Args:
        name: "vitpose-h" or "vitpose-l".
    """
    shape, tokens = VITPOSE[name], _CROP_TOKENS
    layer = 24 * tokens * shape.dim**2 + 4 * tokens**2 * shape.dim
    return shape.layers * layer + _HEAD_FLOPS


def body_flops(name: str) -> int:
    """Returns FLOP of one person in one frame; 0 for "none", and for "rtmw3d": it is not known."""
    return NLF_FLOPS if name == "nlf" else 0


def drawing_flops(width: int, height: int, num_frames: int, persons: int = 1) -> int:
    """Returns FLOP of drawing the bones: every pixel meets every capsule."""
    return _CAPSULES * _CAPSULE_FLOPS * width * height * num_frames * persons
