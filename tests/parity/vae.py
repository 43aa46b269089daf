"""Replays the goldens of the VAE, of its tiling and of the image-to-video condition.

Tolerances: golden/wan_core/README.md (VAE 1e-5, condition exact).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.parity.golden import Check, Golden, exact, rel_max
from xicon_infer.models.i2v_condition import (
    I2VImages,
    build_condition,
    condition_mask,
    condition_video,
)
from xicon_infer.models.vae import WanVAE, config_from_shapes
from xicon_infer.models.vae_tiling import TileOptions, tiled_decode, tiled_encode

TOLERANCE = 1e-5


def load_vae(golden: Golden) -> WanVAE:
    """Returns the VAE whose weights, and mean and std if any, the golden holds.

    Where float32 results on a CPU are compared it computes in the reference's order.
    """
    weights = golden.under("weights.")
    means, stds = (golden.tensors.get(f"in.{name}") for name in ("mean", "std"))
    vae = WanVAE(
        config_from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}),
        means=None if means is None else means.flatten().tolist(),
        stds=None if stds is None else stds.flatten().tolist(),
        fast=golden.target is not None,
    )
    vae.load_state_dict(weights)
    return golden.place(vae.eval())


def replay_vae(golden: Golden) -> list[Check] | None:
    """Returns the checks of a whole-picture VAE golden, in float32 and float64."""
    known = {"encode_mu_raw", "encode_mu_normalized", "decode", "decode_first_latent_only"}
    stored = {key.split(".", 1)[1] for key in golden.keys if key.startswith(("out.", "out64."))}
    if "weights.encoder.conv1.weight" not in golden.keys or not stored & known:
        return None
    vae = load_vae(golden)
    checks = []
    precisions = [("out", torch.float32), ("out64", torch.float64)]
    if golden.target is not None:
        precisions = [("out", vae.conv2.weight.dtype)]
    for prefix, dtype in precisions:
        vae.to(dtype)
        for what, run in _vae_runs(vae, golden, dtype).items():
            expected = golden.tensors.get(f"{prefix}.{what}")
            if expected is not None:
                name = f"{golden.path.stem}:{prefix}:{what}"
                checks.append(Check(name, rel_max(run(), expected), TOLERANCE))
    return checks if golden.target is not None else checks + fast_checks(vae, golden)


def fast_checks(vae: WanVAE, golden: Golden) -> list[Check]:
    """Returns the checks that the fast order is the same function, in float64.

    Not in float32: a VAE this small turns a last bit into 1e-5, so that there the two orders, and
    any two machines, may differ by more than the tolerance without either being wrong.
    """
    vae.double()
    results = []
    for vae.fast, chunk in ((False, 1), (True, 2)):
        runs = _vae_runs(vae, golden, torch.float64, chunk)
        results.append({what: run() for what, run in runs.items()})
    vae.fast = False
    return [
        Check(f"{golden.path.stem}:fast_is_reference:{what}", rel_max(fast, wanted), 1e-9)
        for (what, wanted), fast in zip(results[0].items(), results[1].values(), strict=True)
    ]


def _vae_runs(
    vae: WanVAE, golden: Golden, dtype: torch.dtype, chunk: int = 1
) -> dict[str, Callable[[], Tensor]]:
    """Returns what to run for each output that the inputs allow."""
    runs: dict[str, Callable[[], Tensor]] = {}
    if "in.video" in golden.keys:
        video = golden.tensors["in.video"].to(dtype)
        frames = torch.split(video, 3, dim=2)
        runs["encode_mu_raw"] = lambda: vae.encode(video, chunk=chunk)
        runs["encode_mu_normalized"] = lambda: vae.normalize(vae.encode_chunks(frames, chunk=chunk))
    if "in.latent" in golden.keys:
        latents = vae.denormalize(golden.tensors["in.latent"].to(dtype))
        runs["decode"] = lambda: vae.decode(latents, chunk=chunk)
        runs["decode_first_latent_only"] = lambda: vae.decode(latents[:, :, :1])
    return runs


def replay_tiled(golden: Golden) -> list[Check] | None:
    """Returns the checks of a tiling golden."""
    if not {"in.tile_size_hw_latent", "out.tiled_decode"} <= golden.keys:
        return None
    vae = load_vae(golden)
    size, stride = (golden.tensors[f"in.tile_{name}_hw_latent"] for name in ("size", "stride"))
    tiles = TileOptions(*size.tolist(), *stride.tolist())
    dtype = vae.conv2.weight.dtype
    latents = vae.denormalize(golden.tensors["in.latent"].to(dtype))
    video = golden.tensors["in.video"].to(dtype)
    runs: dict[str, Callable[[], Tensor]] = {
        "tiled_decode": lambda: tiled_decode(vae, latents, tiles)[0],
        "full_decode": lambda: vae.decode(latents)[0],
        "tiled_encode": lambda: vae.normalize(tiled_encode(vae, video, tiles)),
        "full_encode": lambda: vae.normalize(vae.encode(video)),
    }
    checks = [
        Check(f"{golden.path.stem}:{what}", _rel(run(), golden.tensors[f"out.{what}"]), TOLERANCE)
        for what, run in runs.items()
        if f"out.{what}" in golden.keys
    ]
    return checks if golden.target is not None else checks + fast_checks(vae, golden)


def replay_i2v_condition(golden: Golden) -> list[Check] | None:
    """Returns the checks of the pixel video, mask and 20 channels of every case."""
    if not {"case0.mid.vae_input", "case0.out.mask"} <= golden.keys:
        return None
    checks = []
    for case in golden.meta["cases"]:
        stem = f"{golden.path.stem}:case{case['case']}"
        tensors = golden.under(f"case{case['case']}.")
        images = _images(case, tensors)
        if images.size != (case["height"], case["width"]):
            checks.append(Check(stem, 0.0, 0.0, skip="the image must be resized first"))
            continue
        frames = case["num_frames_requested"]
        actual = {
            "mid.vae_input": condition_video(images, frames),
            "out.mask": condition_mask(images, frames),
            "out.y_20ch": build_condition(_stub(tensors["mid.fake_latent"]), images, frames),
        }
        for what, value in actual.items():
            checks.append(Check(f"{stem}:{what}", exact(value, tensors[what]), 0.0))
    for key in sorted(golden.keys):
        if key.startswith("official.mask_F"):
            expected = golden.tensors[key]
            start = torch.zeros(3, 1, expected.shape[2] * 8, expected.shape[3] * 8)
            mask = condition_mask(I2VImages(start), int(key.removeprefix("official.mask_F")))
            checks.append(Check(f"{golden.path.stem}:{key}", exact(mask, expected), 0.0))
    return checks


def replay_i2v_shapes(golden: Golden) -> list[Check] | None:
    """Returns the checks of a list of cases with shapes only."""
    cases = golden.json if golden.kind == "json" else None
    if not isinstance(cases, list) or not cases or not isinstance(cases[0], dict):
        return None
    if not {"mask_shape", "vae_input_shape", "start_frames"} <= cases[0].keys():
        return None
    checks = []
    for case in cases:
        size = (case["height"], case["width"])
        start, end = (
            torch.zeros(3, case[f"{side}_frames"], *size) if case[f"{side}_frames"] else None
            for side in ("start", "end")
        )
        images = I2VImages(start, end, flf2v=case["fun_or_fl2v_model"])
        frames = case["num_frames_requested"]
        actual = {
            "mask_shape": list(condition_mask(images, frames).shape),
            "vae_input_shape": list(condition_video(images, frames).shape),
            "end_flag_to_vae": images.end_apart,
        }
        for what, value in actual.items():
            name = f"{golden.path.stem}.json:case{case['case']}:{what}"
            checks.append(Check(name, exact(value, case[what]), 0.0))
    return checks


def _images(case: dict[str, Any], tensors: dict[str, Tensor]) -> I2VImages:
    """Returns the images [n, H, W, 3] in [0, 1] of a case as the model takes them."""
    start, end = (
        None if image is None else image[..., :3].permute(3, 0, 1, 2) * 2 - 1
        for image in (tensors.get("in.start_image"), tensors.get("in.end_image"))
    )
    return I2VImages(start, end, flf2v=case["fun_or_fl2v_model"])


def _stub(latents: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns an encoder that hands out stored latents, as many frames as its clip asks for."""
    handed = 0

    def encode(video: Tensor) -> Tensor:
        nonlocal handed
        first, handed = handed, handed + (video.shape[2] - 1) // 4 + 1
        return latents[None, :, first:handed]

    return encode


def _rel(actual: Tensor, expected: Tensor) -> float:
    return rel_max(actual.reshape(expected.shape), expected)


REPLAYS = (replay_vae, replay_tiled, replay_i2v_condition, replay_i2v_shapes)
