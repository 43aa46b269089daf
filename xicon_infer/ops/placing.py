"""Tensors that visit a device: there for a while, and afterwards what they were.

Weights are only read, so nothing is copied back: a tensor gets its old storage again. It stays the
same object all the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KV_PROJECTIONS = ("cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img")
"""Layers of a Wan block that only the projection of the conditioning reads."""

KV_NORMS = ("cross_attn.norm_k", "cross_attn.norm_k_img")
"""The norms that the projection of the conditioning reads beside them."""


@contextmanager
def placed(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Has tensors on the device inside; afterwards each has the storage that it had before.

    Args:
        tensors: parameters and buffers; they keep their identity.
        device: where to bring them.
    """
    homes: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            homes = bring(tensors, device)
        yield
    finally:
        put_back(homes)


def outside(model: nn.Module, blocks: Iterable[nn.Module]) -> list[Tensor]:
    """Returns the parameters and buffers of a model that belong to none of its blocks."""
    inside = {id(tensor) for block in blocks for tensor in tensors_of(block)}
    return [tensor for tensor in tensors_of(model) if id(tensor) not in inside]


def kv_layers(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the key and value layers of Wan blocks in the order in which they are called.

    A `BlockSwap` of them projects a conditioning with two of them on the device at a time.
    """
    found = (layer_of(block, name) for block in blocks for name in KV_PROJECTIONS)
    return [layer for layer in found if layer is not None]


def layer_of(block: nn.Module, name: str) -> nn.Module | None:
    """Returns a layer inside a block, None if it has no such layer."""
    found: Any = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def tensors_of(module: nn.Module | None) -> list[Tensor]:
    """Returns the parameters and buffers of a module, none for None."""
    if module is None:
        return []
    return [*module.parameters(), *module.buffers()]


def bring(tensors: Iterable[Tensor], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Brings tensors to the device; returns each with its storage from before.

    If one does not fit, those before it are put back.
    """
    homes: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in tensors:
            home = tensor.data
            homes.append((tensor, home))
            tensor.data = home.to(device)
    except BaseException:
        put_back(homes)
        raise
    return homes


def put_back(homes: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gives tensors the storages that `bring` returned."""
    for tensor, home in homes:
        point((tensor,), (home,))


def point(tensors: Iterable[Tensor], storages: Iterable[Tensor]) -> None:
    """Gives tensors other storages; they stay the same objects, in inference mode too."""
    with torch.inference_mode(False), torch.no_grad():
        for tensor, storage in zip(tensors, storages, strict=True):
            tensor.data = storage
