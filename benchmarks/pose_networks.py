"""The networks that `benchmarks.pose` times: of the published sizes, with random weights.

Nothing is downloaded. The files go to a temporary folder; they are no use for finding poses.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "scail_pose"
CONTRACT = {
    "yolov10m": GOLDEN / "yolov10_contract.onnx",
    "vitpose": GOLDEN / "vitpose_contract.onnx",
    "nlf": GOLDEN / "nlf_contract.torchscript",
}
OPSET = 17

SIZES = {"h": (32, 1280, 16), "l": (24, 1024, 16)}
"""Layers, width and heads of ViTPose."""


class Block(nn.Module):
    """One layer of a vision transformer; attention is written out, for the export."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns tokens [N, L, C] from tokens [N, L, C]."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return cast("Tensor", x + self.fc2(gelu(self.fc1(self.norm2(x)))))


class ViTPoseNetwork(nn.Module):
    """ViTPose with the classic decoder: [N, 3, 256, 192] -> [N, 133, 64, 48]."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16, padding=2)
        self.place = nn.Parameter(torch.zeros(1, 192, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        doublings: list[nn.Module] = []
        for channels in (width, 256):
            doubling = nn.ConvTranspose2d(channels, 256, 4, 2, 1, bias=False)
            doublings += [doubling, nn.BatchNorm2d(256), nn.ReLU()]
        self.head = nn.Sequential(*doublings, nn.Conv2d(256, 133, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns heatmaps."""
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        tokens = self.norm(self.blocks(tokens))
        return cast("Tensor", self.head(tokens.transpose(1, 2).unflatten(2, (16, 12))))


class CropNetwork(nn.Module):
    """Stands in for the crop network of NLF: EfficientNetV2-L at 384 and one linear layer."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(1280, 24 * 3)

    @torch.jit.export
    def estimate_smpl_batched(
        self, images: Tensor, boxes: list[Tensor], intrinsic_matrix: Tensor
    ) -> dict[str, list[Tensor]]:
        """Returns joints [n, 24, 3] of boxes [n, x y w h]; the camera is not used."""
        corners = [torch.cat([box[:, :2], box[:, :2] + box[:, 2:4]], dim=1) for box in boxes]
        weight = self.head.weight
        place = [torch.full([len(box), 1], float(i)) for i, box in enumerate(corners)]
        rois = torch.cat([torch.cat(place).to(corners[0]), torch.cat(corners)], dim=1)
        crops = torch.ops.torchvision.roi_align(
            images.to(weight.dtype) / 255, rois.to(weight.dtype), 1.0, 384, 384, 1, True
        )
        joints = self.head(self.trunk(crops).mean(dim=[2, 3])).float().view(-1, 24, 3)
        return {"joints3d_nonparam": list(joints.split([len(box) for box in boxes]))}


def network_paths(args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, Any]]:
    """Returns the files of the networks, and what each is; a failed export says why it failed."""
    paths = dict(CONTRACT)
    facts: dict[str, Any] = {name: {"network": file.name} for name, file in CONTRACT.items()}
    if args.networks == "contract":
        return paths, facts
    exports = {"yolov10m": export_detector, "vitpose": export_keypoints, "nlf": export_bodies}
    for name, export in exports.items():
        try:
            paths[name], facts[name] = export(args)
        except ImportError as error:  # noqa: PERF203  three times at most
            facts[name]["left_out"] = f"the network of true size was not exported: {error}"
    return paths, facts


def export_detector(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Returns YOLOv10m, one picture at a time as published, and facts about it."""
    settings = {"YOLO_CONFIG_DIR": str(args.folder), "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0"}
    with mock.patch.dict(os.environ, settings):
        from ultralytics.models import YOLO

        model: Any = YOLO("yolov10m.yaml", verbose=False)
        # The head that gives 300 rows and needs no suppression, as in the published file.
        model.model.end2end = True
        model.model.eval().fuse(verbose=False)
        facts = cost(model.model, torch.zeros(1, 3, 640, 640))
        model.model.pt_path = str(args.folder / "yolov10m.pt")  # the exported file lies beside it
        path = model.export(format="onnx", imgsz=640, simplify=False, opset=OPSET, nms=False)
    return Path(path), {"network": "YOLOv10m 640x640, random weights", **facts}


def export_keypoints(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Returns ViTPose with any batch, weights beside the file, and facts about it."""
    import onnx

    layers, width, heads = SIZES[args.keypoint_size]
    path = args.folder / f"vitpose_{args.keypoint_size}.onnx"
    with torch.device("meta"):
        facts = cost(ViTPoseNetwork(layers, width, heads).eval(), torch.zeros(1, 3, 256, 192))
    if not path.is_file():
        scratch = args.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        # Weights above 2 GB cannot stand in the file; the exporter then writes one file each.
        torch.onnx.export(
            ViTPoseNetwork(layers, width, heads).eval(),
            (torch.zeros(1, 3, 256, 192),),
            str(scratch / "scratch.onnx"),
            input_names=["input_0"],
            output_names=["output_0"],
            dynamic_axes={"input_0": {0: "N"}, "output_0": {0: "N"}},
            opset_version=OPSET,
            dynamo=False,
        )
        graph = onnx.load(scratch / "scratch.onnx")
        onnx.save_model(graph, path, save_as_external_data=True, location=f"{path.stem}_data.bin")
        shutil.rmtree(scratch)
    name = f"ViTPose-{args.keypoint_size.upper()} 256x192, 133 points, random weights"
    return path, {"network": name, **facts}


def export_bodies(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Returns the stand-in for NLF as TorchScript, and facts about it."""
    from torchvision.models import efficientnet_v2_l

    half = torch.device(args.device).type == "cuda"
    path = args.folder / f"crop_network_{'float16' if half else 'float32'}.torchscript"
    trunk = efficientnet_v2_l(weights=None).features.eval()
    facts = cost(trunk.to("meta"), torch.zeros(1, 3, 384, 384, device="meta"))
    if not path.is_file():
        network = CropNetwork(efficientnet_v2_l(weights=None).features).eval()
        scripted: Any = torch.jit.script(network.half() if half else network)
        scripted.save(str(path))
    name = (
        "stand-in for NLF: torchvision EfficientNetV2-L trunk on crops of 384x384 and one linear "
        "layer, random weights; without NLF's own heads, detector, SMPL fit and vertices"
    )
    return path, {"network": name, "dtype": "float16" if half else "float32", **facts}


def cost(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Returns parameters, and FLOP for one input (2 per multiplication and addition)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return {
        "million_parameters": round(sum(p.numel() for p in network.parameters()) / 1e6, 1),
        "gflop_per_input": round(counter.get_total_flops() / 1e9, 1),
    }
