"""The networks of a pipeline, and how they share the device.

A memory plan (`pipelines.memory`) says where they lie: all on the device, one at a time, or with
the blocks of the transformer coming and going. `pipelines.loading` makes the components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import nn

from pipelines.condition_cache import ConditionCache
from pipelines.frame_stream import Use
from pipelines.memory_plan import MemoryPlan
from xicon_infer.ahead import Later
from xicon_infer.models.tiny_decoder import TinyDecoder
from xicon_infer.models.tokenizer import Tokenizer
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.cudnn import searching
from xicon_infer.ops.lora_keys import LoraFile
from xicon_infer.ops.offload import BlockSwap, projecting, streaming
from xicon_infer.ops.placing import KV_PROJECTIONS, kv_layers, placed, tensors_of

Part = Literal["transformer", "vae", "text_encoder", "image_encoder", "preview"]
PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "image_encoder", "preview")

Model = TypeVar("Model", bound=WanTransformer)


@dataclass
class Components(Generic[Model]):
    """The networks of one pipeline. They lie on the host until they are used.

    image_encoder: None for a model that reads text alone. plan: where they lie while they work;
    None keeps all on the device once they were there. cache: what the encoders made, by content.
    sources: component -> the file it came from. notes: what loading did beyond the obvious. facts:
    choices for the report, JSON values. merged: LoRAs that are part of the transformer's file, by
    name, and their strengths. lora_files: those that were read. load_notes: notes without LoRAs.
    preview: a small decoder in place of the VAE's, for drafts. fixed_vae_chunk: latent frames that
    the VAE handles at once, whatever the plan says. cudnn_search: see `ops.cudnn`. frames_to: gets
    the frames of a video while it is decoded, see `pipelines.frame_stream`. waiting: entered while
    the transformer is waited for.
    """

    _transformer: Model | None
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
    preview: TinyDecoder | None = None
    fixed_vae_chunk: int | None = None
    cudnn_search: bool = False
    frames_to: Use | None = None
    _swaps: dict[str, BlockSwap] = field(default_factory=dict)
    waiting: Callable[[], AbstractContextManager[Any]] = nullcontext
    _held: ExitStack | None = None
    _coming: Later[Model] | None = None
    _on_arrival: list[Callable[[], None]] = field(default_factory=list)

    @property
    def transformer(self) -> Model:
        """Returns the transformer; where it is still being read, when it is there.

        Raises:
            WeightsError: it cannot be read, or does not fit.
        """
        if self._coming is not None:
            with self.waiting():
                self._transformer = self._coming.result()
            self._coming = None
            while self._on_arrival:
                self._on_arrival.pop(0)()
        assert self._transformer is not None
        return self._transformer

    @transformer.setter
    def transformer(self, model: Model) -> None:
        self._transformer = model

    def come(self, transformer: Later[Model]) -> None:
        """Takes a transformer that is being read; the others can work meanwhile."""
        self._coming = transformer

    def when_here(self, call: Callable[[], None]) -> None:
        """Calls something that needs the transformer: now, or when it was waited for."""
        if self._coming is None:
            call()
        else:
            self._on_arrival.append(call)

    @property
    def complete(self) -> bool:
        """Returns False while the transformer is being read, and if it could not be."""
        return self._coming is None or (self._coming.done and not self._coming.failed)

    @property
    def usable(self) -> bool:
        """Returns False if the transformer could not be read."""
        return self._coming is None or not self._coming.failed

    def stop_reading(self) -> None:
        """Stops reading the transformer; the components are of no use then."""
        if self._coming is not None:
            self._coming.stop()

    @property
    def resident(self) -> bool:
        """Returns True if all components stay on the device."""
        return self.plan is None or self.plan.mode == "resident"

    @property
    def vae_chunk(self) -> int | None:
        """Returns how many latent frames the VAE handles at once; None: as the size asks for."""
        if self.fixed_vae_chunk is not None or self.plan is None:
            return self.fixed_vae_chunk
        return self.plan.vae_chunk

    @property
    def decoder(self) -> WanVAE | TinyDecoder:
        """Returns what makes pixels of latents."""
        return self.vae if self.preview is None else self.preview

    @property
    def decoder_part(self) -> Part:
        """Returns the name of `decoder`."""
        return "vae" if self.preview is None else "preview"

    def follow(self, plan: MemoryPlan | None) -> None:
        """Takes another memory plan; networks that are to wait leave the device."""
        if plan is None or not plan.keep_transformer:
            self.release()
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
        """Has an encoder or the VAE on the device inside; it stays there only if all fit.

        A transformer that could not be read ends the work of the others here.
        """
        if self._coming is not None:
            self._coming.check()
        module: nn.Module = getattr(self, name)
        with searching(self.cudnn_search and name in ("vae", "preview")), self._there(name, module):
            yield

    @contextmanager
    def _there(self, name: Part, module: nn.Module) -> Iterator[None]:
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
        many blocks waiting on the host as the plan says. It stays afterwards if the plan says so.
        """
        if self.resident or self.plan is None:
            return self.on_device("transformer")
        if self._held is not None:
            return nullcontext()
        blocks: list[nn.Module] = list(self.transformer.layers)
        swap = self._swap("blocks", blocks, self.plan.blocks_to_swap, aside=KV_PROJECTIONS)
        there = streaming(self.transformer, swap)
        if not self.plan.keep_transformer:
            return there
        with ExitStack() as stack:
            stack.enter_context(there)
            self._held = stack.pop_all()
        return nullcontext()

    def release(self) -> None:
        """Has a transformer that stayed leave the device; before its weights change, too."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def _swap(
        self, name: str, blocks: list[nn.Module], swapped: int, aside: tuple[str, ...] = ()
    ) -> BlockSwap:
        """Returns the swap of that name; its host memory is kept for the next job."""
        if name not in self._swaps:
            self._swaps[name] = BlockSwap(blocks, swapped, self.device, aside=aside)
        return self._swaps[name]
