"""Replays goldens of the text encoder, the image encoder and its preprocessing.

References: Wan-Video/Wan2.1 (wan/modules/t5.py, wan/modules/clip.py) and Comfy-Org/ComfyUI
(comfy/clip_vision.py); see the README beside the goldens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from tests.parity.golden import Check, Golden, rel_max
from xicon_infer.models import text, vision
from xicon_infer.weights.keymaps_encoders import map_image_encoder, map_text_encoder

_TOLERANCE = 1e-5
"""Greatest error relative to the greatest value, CPU float32 (README of the goldens)."""


def replay_text_encoder(golden: Golden) -> list[Check] | None:
    """Returns the checks of a UMT5 encoder golden, or None."""
    if not {"in.ids", "in.mask", "out.hidden", "weights.token_embedding.weight"} <= golden.keys:
        return None
    ids, mask = golden.tensors["in.ids"], golden.tensors["in.mask"]
    model = load_text_encoder(golden)
    count = len(list(model.get_submodule("encoder.block").children()))
    blocks = [f"encoder.block.{i}" for i in range(count)]
    with torch.no_grad(), recorded(model, blocks) as states:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    results = {"out.hidden": hidden}
    results |= {f"mid.block{i}": state for i, state in enumerate(states)}
    for i, block in enumerate(blocks):
        attention = model.get_submodule(f"{block}.layer.0.SelfAttention")
        bias = attention.compute_bias(ids.shape[1], ids.shape[1])  # type: ignore[operator]
        results[f"mid.block{i}_pos_bias"] = bias
    results |= {
        f"out.trimmed.{b}": rows for b, rows in enumerate(text.encode_ids(model, ids, mask))
    }
    checks = _compare(golden, results)
    for b, length in enumerate(mask.sum(1).tolist()):
        (alone,) = text.encode_ids(model, ids[b : b + 1, :length], mask[b : b + 1, :length])
        checks.append(_check(golden, f"out.trimmed.{b}", alone, suffix=":unpadded"))
    return checks


def replay_image_encoder(golden: Golden) -> list[Check] | None:
    """Returns the checks of a CLIP vision golden, or None."""
    if not {"in.pixel_values", "out.penultimate", "weights.visual.cls_embedding"} <= golden.keys:
        return None
    pixel_values = golden.tensors["in.pixel_values"]
    model = load_image_encoder(golden)
    whole = load_image_encoder(golden, every_layer=True)
    results = {
        "out.penultimate": vision.encode_pixels(model, pixel_values),
        "out.last": vision.encode_pixels(whole, pixel_values),
    }
    if "in.image_minus1_1" in golden.keys:
        # The reference keeps the frames of a clip on the second axis.
        frames = golden.tensors["in.image_minus1_1"].transpose(0, 1)
        squashed = vision.stretch(frames, size=pixel_values.shape[-1])
        results["out.visual_from_image"] = vision.encode_pixels(model, squashed)
    return _compare(golden, results)


def replay_comfy_preprocess(golden: Golden) -> list[Check] | None:
    """Returns the checks of a ComfyUI CLIP preprocessing golden, or None."""
    pattern = re.compile(r"case(\d+)\.out\.pixel_values")
    numbers = sorted(int(m[1]) for key in golden.keys if (m := pattern.fullmatch(key)))
    if not numbers or f"case{numbers[0]}.in.image_u8" not in golden.keys:
        return None
    options = {case["case"]: case for case in golden.meta["cases"]}
    checks = []
    for number in numbers:
        image = golden.tensors[f"case{number}.in.image_u8"].numpy()
        mode: vision.PreprocessMode = "center" if options[number]["crop"] else "comfy_stretch"
        pixels = vision.preprocess(image, size=options[number]["size"], mode=mode)
        key = f"case{number}.out.pixel_values"
        checks.append(_check(golden, key, _forgive_rounding(pixels, golden.tensors[key])))
    return checks


REPLAYS = (replay_text_encoder, replay_image_encoder, replay_comfy_preprocess)


def load_text_encoder(golden: Golden) -> nn.Module:
    """Returns the float32 text encoder with the weights of a golden in Wan naming."""
    state = map_text_encoder(golden.under("weights."))
    shapes = {key: tensor.shape for key, tensor in state.items()}
    config = text.config_from_shapes(shapes, max_distance=golden.meta["config"]["max_dist"])
    model = text.build_text_encoder(config)
    model.load_state_dict(state, strict=True)
    return golden.place(model)


def load_image_encoder(golden: Golden, *, every_layer: bool = False) -> nn.Module:
    """Returns the float32 vision tower with the weights of a golden in official naming."""
    state = map_image_encoder(golden.under("weights."), every_layer=every_layer)
    shapes = {key: tensor.shape for key, tensor in state.items()}
    options = golden.meta["config"]
    config = vision.config_from_shapes(shapes, num_heads=options["num_heads"])
    model = vision.build_image_encoder(replace(config, activation=options["activation"]))
    model.load_state_dict(state, strict=True)
    return golden.place(model)


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[list[torch.Tensor]]:
    """Yields a list that fills with what the named submodules return, in running order."""
    outputs: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        state = output[0] if isinstance(output, tuple) else output
        assert isinstance(state, torch.Tensor)
        outputs.append(state)

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _forgive_rounding(pixels: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Returns the pixels, isolated ones that rounded to the next 8-bit level put right.

    The README allows these: the preprocessing rounds to 8 bits, and a value half-way between two
    levels may fall on either side. More than one in a thousand are not isolated.
    """
    if pixels.shape != expected.shape:
        return pixels
    difference = (pixels - expected).abs()
    level = torch.tensor(vision.STD).view(3, 1, 1).reciprocal() / 255
    rounded = (difference > _TOLERANCE) & (difference < 1.001 * level)
    if rounded.float().mean() > 1e-3:
        return pixels
    return torch.where(rounded, expected, pixels)


def _compare(golden: Golden, results: dict[str, torch.Tensor]) -> list[Check]:
    """Returns one check for each result that the golden holds."""
    return [_check(golden, key, value) for key, value in results.items() if key in golden.keys]


def _check(golden: Golden, key: str, value: torch.Tensor, suffix: str = "") -> Check:
    error = rel_max(value, golden.tensors[key])
    return Check(f"{golden.path.stem}:{key}{suffix}", error, _TOLERANCE)
