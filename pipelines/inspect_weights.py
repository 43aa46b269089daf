"""What a weights file is, compared with the model that it is for.

The model is built on the meta device at the sizes that the file has, which costs no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pipelines.loading import transformer_class
from xicon_infer.errors import XiconError
from xicon_infer.models import text, vae, vision, wan
from xicon_infer.weights.detect import Kind
from xicon_infer.weights.inspect import Inspection, compare, inspect_file

Shapes = Mapping[str, tuple[int, ...]]

_ONE_HEAD = 1
"""Heads leave no trace in the shapes of a CLIP tower."""


def inspect_weights(path: Path, *, check_finite: bool = False) -> Inspection:
    """Returns what a file is, and what it lacks or has beyond the model of its kind and size.

    Args:
        path: a file, an index of shards, or a folder with one of them.
        check_finite: also reads every weight and looks for NaN and infinity; slow.

    Raises:
        WeightsError: the file cannot be opened as a checkpoint at all.
    """
    found = inspect_file(path, check_finite=check_finite)
    if found.detected is None or not found.shapes:
        return found
    try:
        expected = expected_shapes(found.detected.kind, found.shapes)
    except XiconError as error:
        return replace(found, problems=(*found.problems, error.message))
    return found if expected is None else compare(found, expected)


def expected_shapes(kind: Kind, shapes: Shapes) -> dict[str, tuple[int, ...]] | None:
    """Returns the shapes of all tensors of a model; None for a kind that has no class here.

    Args:
        kind: what the file is.
        shapes: shape by name, under the names of our modules, from which the sizes are read.

    Raises:
        XiconError: a tensor that tells a size is missing or odd.
    """
    if kind in ("lora", "scail2"):
        return None
    with torch.device("meta"):
        module = _build(kind, shapes)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _build(kind: Kind, shapes: Shapes) -> nn.Module:
    if kind == "vae":
        return vae.WanVAE(vae.config_from_shapes(shapes))
    if kind == "text_encoder":
        return text.build_text_encoder(text.config_from_shapes(shapes))
    if kind == "image_encoder":
        tower = vision.config_from_shapes(shapes, num_heads=_ONE_HEAD)
        return vision.build_image_encoder(tower)
    config = wan.config_from_shapes(shapes)
    # The highest number counts, so that a block that is missing inside is missed.
    blocks = [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")]
    return transformer_class(kind)(replace(config, num_layers=max(blocks) + 1))
