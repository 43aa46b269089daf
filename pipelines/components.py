"""The networks of a pipeline, and how they share the device.

A GPU that cannot hold everything at once holds one component at a time; the plan says which.
`pipelines.loading` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from pipelines.condition_cache import ConditionCache
from xicon_infer.models.tokenizer import Tokenizer
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.wan import WanTransformer

Part = Literal["transformer", "vae", "text_encoder", "image_encoder"]
PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "image_encoder")

Model = TypeVar("Model", bound=WanTransformer)


@dataclass
class Components(Generic[Model]):
    """The networks of one pipeline. They lie on the host until `on_device` is entered.

    image_encoder: None for a model that reads text alone. resident: all components stay on the
    device once they were there. cache: what the encoders made, by content. sources: component ->
    the file it came from. notes: what loading did beyond the obvious. facts: choices for the
    report, JSON values.
    """

    transformer: Model
    vae: WanVAE
    text_encoder: nn.Module
    image_encoder: nn.Module | None
    tokenizer: Tokenizer
    device: torch.device
    resident: bool
    cache: ConditionCache = field(default_factory=ConditionCache)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def on_device(self, name: Part) -> Iterator[None]:
        """Has the component on the device inside; it leaves again if not everything fits."""
        module: nn.Module = getattr(self, name)
        module.to(self.device)
        try:
            yield
        finally:
            if not self.resident:
                module.to("cpu")
