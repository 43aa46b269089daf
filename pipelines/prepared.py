"""Prepared transformers: two files made by `pipelines.prepare`, read as one checkpoint.

`NAME.safetensors` holds what every step uses, `NAME.kv.safetensors` the weights that make keys and
values of prompt and picture: a quarter of the whole, used once per job. Both carry the same
description; a pair that was not made together is refused.

The context weights of a loaded model can be set aside (`take_context_weights`), so that moving the
model to a device or counting its bytes leaves them out, and be put back for the next prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from xicon_infer.errors import WeightsError
from xicon_infer.models.wan import WanTransformer
from xicon_infer.weights.checkpoint import Checkpoint, open_checkpoint

PREPARED = "xicon_prepared"
"""Key of the description in the metadata of both files."""

FORMAT_VERSION = 1

SUFFIX = ".safetensors"
CONTEXT_SUFFIX = ".kv.safetensors"

CONTEXT_MODULES = ("k", "norm_k", "v", "k_img", "norm_k_img", "v_img")
"""Parts of a cross-attention that `CrossAttention.project` alone uses, in that order."""

_CONTEXT = re.compile(rf"blocks\.\d+\.cross_attn\.({'|'.join(CONTEXT_MODULES)})\.[a-z_]+")


@dataclass(frozen=True)
class Prepared:
    """What a prepared transformer is.

    path, context_path: its two files. kind: the model, as "scail". storage: "fp8" or "bf16".
    transformer: name and bytes of the source. loras: name, strength, bytes and sha256 of each LoRA
    merged in. guarded: weights that stayed wide in fp8, and why. content: SHA-256 over all tensors
    and everything above but the paths.
    """

    path: Path
    context_path: Path
    kind: str
    storage: str
    transformer: dict[str, Any]
    loras: tuple[dict[str, Any], ...]
    guarded: dict[str, str]
    content: str


def context_path(path: Path) -> Path:
    """Returns the second file of a prepared transformer from the first."""
    return path.with_name(path.name.removesuffix(SUFFIX) + CONTEXT_SUFFIX)


def is_context_name(name: str) -> bool:
    """Returns whether a tensor (original Wan name) goes to the second file."""
    return _CONTEXT.fullmatch(name) is not None


def open_transformer(path: Path) -> Checkpoint:
    """Returns what a transformer file holds; of a prepared one, what both files hold together.

    Raises:
        WeightsError: as `open_checkpoint`; or the second file is missing or of another model.
    """
    checkpoint = open_checkpoint(path)
    about = describe(checkpoint)
    if about is None:
        return checkpoint
    if not about.context_path.is_file():
        raise WeightsError(
            f"{checkpoint.path}: its second file {about.context_path.name} is missing. Both belong "
            "in one folder; copy it there or prepare the model again.",
            field="transformer",
        )
    second = open_checkpoint(about.context_path)
    found = _read_description(second)
    if found is None or found.get("part") != "context" or found["content"] != about.content:
        raise WeightsError(
            f"{about.context_path}: was not made together with {checkpoint.path.name}. Prepare the "
            "model again, or copy both files of one run.",
            field="transformer",
        )
    return replace(
        checkpoint,
        shapes={**checkpoint.shapes, **second.shapes},
        dtypes={**checkpoint.dtypes, **second.dtypes},
        files={**checkpoint.files, **second.files},
        offsets={**checkpoint.offsets, **second.offsets},
    )


def describe(checkpoint: Checkpoint) -> Prepared | None:
    """Returns what a prepared transformer is, or None for any other file.

    Raises:
        WeightsError: the description cannot be read, is of a newer version, or the file is the
            second one of its pair.
    """
    found = _read_description(checkpoint)
    if found is None:
        return None
    if found["part"] != "main":
        main = checkpoint.path.name.removesuffix(CONTEXT_SUFFIX) + SUFFIX
        raise WeightsError(
            f"{checkpoint.path}: is the second file of a prepared model; name the first, {main}",
            field="transformer",
        )
    return Prepared(
        path=checkpoint.path,
        context_path=context_path(checkpoint.path),
        kind=found["kind"],
        storage=found["storage"],
        transformer=found["transformer"],
        loras=tuple(found["loras"]),
        guarded=found["guarded"],
        content=found["content"],
    )


def _read_description(checkpoint: Checkpoint) -> dict[str, Any] | None:
    text = checkpoint.metadata.get(PREPARED)
    if text is None:
        return None
    try:
        found = json.loads(text)
        version = found["version"]
        keys = {"part", "kind", "storage", "transformer", "loras", "guarded", "content"}
        missing = keys - set(found)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{checkpoint.path}: unreadable description: {error!r}") from error
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"{checkpoint.path}: prepared in format {version}, this program reads "
            f"{FORMAT_VERSION}. Prepare the model again."
        )
    if missing:
        raise WeightsError(f"{checkpoint.path}: its description lacks {', '.join(sorted(missing))}")
    return dict(found)


def take_context_weights(model: WanTransformer) -> list[dict[str, nn.Module]]:
    """Takes the context weights out of a model and returns them, a dictionary per block.

    The model still predicts, because the context is passed in; it cannot encode another one, nor
    take other LoRAs, until `put_context_weights`. Dropping the result frees the memory.
    """
    taken = []
    for block in model.layers:
        attention = block.cross_attn
        found = {name: getattr(attention, name, None) for name in CONTEXT_MODULES}
        parts = {name: part for name, part in found.items() if isinstance(part, nn.Module)}
        for name in parts:
            delattr(attention, name)
        taken.append(parts)
    return taken


def put_context_weights(model: WanTransformer, taken: list[dict[str, nn.Module]]) -> None:
    """Puts back what `take_context_weights` took, on whatever device it is now."""
    for block, parts in zip(model.layers, taken, strict=True):
        for name, part in parts.items():
            setattr(block.cross_attn, name, part)


@contextmanager
def context_weights_aside(model: WanTransformer) -> Iterator[None]:
    """Has the context weights out of the model inside; they stay where they are in memory."""
    taken = take_context_weights(model)
    try:
        yield
    finally:
        put_context_weights(model, taken)
