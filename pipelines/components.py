"""The networks of a pipeline, and how they share the device.

A memory plan (`pipelines.memory`) says where they lie: all on the device, one at a time, or with
the blocks of the transformer coming and going. `pipelines.loading` makes the components.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import nn

from pipelines.condition_cache import ConditionCache
from pipelines.frames import MAX_PIECE
from pipelines.memory_plan import MemoryPlan
from xicon_infer.models.tokenizer import Tokenizer
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.lora_keys import LoraFile
from xicon_infer.ops.offload import BlockSwap, projecting, streaming
from xicon_infer.ops.placing import KV_PROJECTIONS, kv_layers, placed, tensors_of

Part = Literal["transformer", "vae", "text_encoder", "image_encoder"]
PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "image_encoder")

Model = TypeVar("Model", bound=WanTransformer)


@dataclass
class Components(Generic[Model]):
    """The networks of one pipeline. They lie on the host until they are used.

    image_encoder: None for a model that reads text alone. plan: where they lie while they work;
    None keeps all on the device once they were there. cache: what the encoders made, by content.
    sources: component -> the file it came from. notes: what loading did beyond the obvious. facts:
    choices for the report, JSON values. merged: LoRAs that are part of the transformer's file, by
    name, and their strengths. lora_files: those that were read. load_notes: notes without LoRAs.
    """

    transformer: Model
    vae: WanVAE
    text_encoder: nn.Module
    image_encoder: nn.Module | None
    tokenizer: Tokenizer
    device: torch.device
    plan: MemoryPlan | None = None
    cache: ConditionCache = field(default_factory=ConditionCache)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    merged: dict[str, float] = field(default_factory=dict)
    lora_files: dict[str, LoraFile] = field(default_factory=dict)
    load_notes: tuple[str, ...] = ()
    _swaps: dict[str, BlockSwap] = field(default_factory=dict)

    @property
    def resident(self) -> bool:
        """Returns True if all components stay on the device."""
        return self.plan is None or self.plan.mode == "resident"

    @property
    def vae_chunk(self) -> int:
        """Returns how many latent frames the VAE may handle at once."""
        return MAX_PIECE if self.plan is None else self.plan.vae_chunk

    def follow(self, plan: MemoryPlan | None) -> None:
        """Takes another memory plan; networks that are to wait leave the device."""
        was_resident = self.resident
        swapped = (self.plan.blocks_to_swap if self.plan else 0) != (
            plan.blocks_to_swap if plan else 0
        )
        self.plan = plan
        if swapped or self.resident:
            for swap in self._swaps.values():
                swap.close()
            self._swaps.clear()
        if was_resident and not self.resident:
            for name in PARTS:
                module: nn.Module | None = getattr(self, name)
                if module is not None:
                    module.to("cpu")

    @contextmanager
    def on_device(self, name: Part) -> Iterator[None]:
        """Has an encoder or the VAE on the device inside; it stays there only if all fit."""
        module: nn.Module = getattr(self, name)
        if self.resident:
            module.to(self.device)
            yield
        elif name == "text_encoder" and self.plan is not None and self.plan.stream_encoder:
            blocks = cast("list[nn.Module]", list(module.encoder.block))  # type: ignore[union-attr, arg-type]
            with streaming(module, self._swap(name, blocks, len(blocks))):
                yield
        else:
            with placed(tensors_of(module), self.device):
                yield

    def projecting(self) -> AbstractContextManager[Any]:
        """Has what the transformer needs to take up its conditioning on the device inside.

        Where not everything fits, keys and values are made with a layer or two at a time.
        """
        if self.resident:
            return self.on_device("transformer")
        layers = kv_layers(self.transformer.layers)
        swap = self._swap("projections", layers, len(layers))
        return projecting(self.transformer, self.transformer.layers, swap)

    def sampling(self) -> AbstractContextManager[Any]:
        """Has the transformer ready to predict inside.

        Where not everything fits, without the weights that only `projecting` reads, and with as
        many blocks waiting on the host as the plan says.
        """
        if self.resident or self.plan is None:
            return self.on_device("transformer")
        blocks: list[nn.Module] = list(self.transformer.layers)
        swap = self._swap("blocks", blocks, self.plan.blocks_to_swap, aside=KV_PROJECTIONS)
        return streaming(self.transformer, swap)

    def _swap(
        self, name: str, blocks: list[nn.Module], swapped: int, aside: tuple[str, ...] = ()
    ) -> BlockSwap:
        """Returns the swap of that name; its host memory is kept for the next job."""
        if name not in self._swaps:
            self._swaps[name] = BlockSwap(blocks, swapped, self.device, aside=aside)
        return self._swaps[name]
