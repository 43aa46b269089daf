"""From files to the networks of a pipeline: found, read, checked, assembled.

Every component goes the same way, real or tiny: tensors under the published names, renamed to the
module's own, sizes read from the shapes, module built on the meta device, tensors assigned by
name with nothing missing and nothing left over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines import tiny
from pipelines.components import Components
from pipelines.memory_plan import MemoryPlan
from pipelines.prepared import describe, open_transformer
from pipelines.storage import Storage, apply_storage, swap_loras
from xicon_infer.errors import WeightsError
from xicon_infer.models import text, vae, vision, wan
from xicon_infer.models.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_bytes
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.linear import Matmul
from xicon_infer.ops.lora_keys import LoraFile, read_lora
from xicon_infer.weights.checkpoint import Checkpoint, open_checkpoint, read_tensors
from xicon_infer.weights.detect import Kind, detect, refuse_other_kind
from xicon_infer.weights.keymaps import to_vae_names, to_wan_names
from xicon_infer.weights.keymaps_encoders import (
    map_image_encoder,
    map_text_encoder,
    sentencepiece_bytes,
)
from xicon_infer.weights.manifest import (
    FileEntry,
    fetch_command,
    files_for,
    locate,
    locate_named,
    missing_message,
)
from xicon_infer.weights.reader import stream_tensors
from xicon_infer.weights.strict import DtypePolicy, dit_policy, load_strict

State = Mapping[str, Tensor]

KINDS: Mapping[str, tuple[Kind, ...]] = {
    "scail": ("scail",),
    "steady_dancer": ("steady_dancer",),
    "wan_i2v": ("wan_i2v", "wan_flf2v"),
    "wan_t2v": ("wan_t2v",),
}
"""Pipeline -> the transformers it can run."""

_TINY = {
    "scail": tiny.TINY_SCAIL,
    "steady_dancer": tiny.TINY_I2V,
    "wan_i2v": tiny.TINY_I2V,
    "wan_t2v": tiny.TINY_T2V,
}


@dataclass(frozen=True)
class LoadOptions:
    """How components are loaded.

    device, dtype: where and in what precision to compute. attention: kernel, "auto" for the
    fastest. loras: names or paths with strengths. lora_mode: see `xicon_infer.ops.lora`. storage,
    matmul: how the transformer's weights lie and multiply, see `pipelines.storage`. transformer: a
    file in place of that of the preset. search_dirs: folders with weights. plan: where the networks
    lie while they work; None for all on the device.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    attention: str = "auto"
    loras: tuple[tuple[str, float], ...] = ()
    lora_mode: Literal["full", "merge", "comfy_unmerged"] = "full"
    storage: Storage = "reference"
    matmul: Matmul | Literal["auto"] = "auto"
    transformer: Path | None = None
    search_dirs: tuple[Path, ...] = ()
    plan: MemoryPlan | None = None

    @property
    def home(self) -> torch.device:
        """Returns where weights are read to: the device if they stay there."""
        stay = self.plan is None or self.plan.mode == "resident"
        return self.device if stay and self.device.type == "cuda" else torch.device("cpu")

    @property
    def encoder_dtype(self) -> torch.dtype:
        """Returns the precision outside the transformer.

        UMT5 overflows in float16, and the VAE was only ever run in bfloat16 or float32.
        """
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16


def transformer_class(pipeline: str) -> type[WanTransformer]:
    """Returns the class of the transformer that a pipeline runs."""
    if pipeline == "scail":
        from xicon_infer.models.scail import ScailTransformer

        return ScailTransformer
    if pipeline == "steady_dancer":
        from xicon_infer.models.steady_dancer import SteadyDancerTransformer

        return SteadyDancerTransformer
    return WanTransformer


def load_tiny(pipeline: str, options: LoadOptions | None = None) -> Components[Any]:
    """Returns the tiny components of a pipeline: real classes, generated weights.

    Args:
        pipeline: as "scail".
        options: where and how; float32 on the CPU if None.
    """
    config = _TINY[pipeline]
    states = {
        "transformer": tiny.tiny_transformer_state(transformer_class(pipeline), config),
        "vae": tiny.tiny_vae_state(),
        "text_encoder": tiny.tiny_text_state(),
    }
    if config.image_dim is not None:
        states["image_encoder"] = tiny.tiny_vision_state()
    sources = dict.fromkeys((*states, "tokenizer"), f"tiny {pipeline}, generated")
    options = options or LoadOptions()
    heads = tiny.TINY_VISION.num_heads
    return assemble(pipeline, states, tiny.tiny_tokens(), sources, options, vision_heads=heads)


def load_preset(pipeline: str, preset: str, options: LoadOptions) -> Components[Any]:
    """Returns the components that the manifest lists for a preset, from local files.

    Args:
        pipeline: as "scail".
        preset: of the pipeline, as "fp8".
        options: where and how.

    Raises:
        WeightsError: a file is missing (all missing ones are named), damaged, or of another model.
    """
    entries = [e for e in files_for(pipeline, preset) if e.component != "lora"]
    given = {} if options.transformer is None else {"transformer": options.transformer}
    paths = find_files([e for e in entries if e.component not in given], options.search_dirs)
    paths |= given
    checkpoints = {
        name: open_transformer(path) if name == "transformer" else open_checkpoint(path)
        for name, path in paths.items()
        if name != "tokenizer"
    }
    found = detect(checkpoints["transformer"].shapes)
    refuse_other_kind(found, KINDS[pipeline], paths["transformer"])
    states = {name: read_state(checkpoint, options) for name, checkpoint in checkpoints.items()}
    embedded = sentencepiece_bytes(states["text_encoder"])
    tokenizer = (
        load_tokenizer(paths["tokenizer"])
        if "tokenizer" in paths
        else tokenizer_from_bytes(embedded or b"", source=str(paths["text_encoder"]))
    )
    sources = {name: str(path) for name, path in paths.items()}
    prepared = describe(checkpoints["transformer"])
    merged = () if prepared is None else tuple(prepared.loras)
    return assemble(pipeline, states, tokenizer, sources, options, merged=merged)


def read_state(checkpoint: Checkpoint, options: LoadOptions) -> State:
    """Returns the tensors of a file where they are wanted; quantised ones of GGUF are unpacked."""
    return stream_tensors(checkpoint, device=options.home, dtype=options.dtype)


def find_files(entries: list[FileEntry], search_dirs: tuple[Path, ...]) -> dict[str, Path]:
    """Returns component -> file. A text encoder file may bring the tokenizer with it.

    Raises:
        WeightsError: files are missing; all of them are named, with where to get each.
    """
    found = {entry.component: locate(entry, search_dirs) for entry in entries}
    encoder = found.get("text_encoder")
    missing = [entry for entry in entries if found[entry.component] is None]
    if encoder is not None and "spiece_model" in open_checkpoint(encoder).shapes:
        missing = [entry for entry in missing if entry.component != "tokenizer"]
    if missing:
        raise WeightsError(
            " ".join(missing_message(entry, search_dirs) for entry in missing)
            + f" One command gets them: {fetch_command(missing)} ; then give --models-dir models "
            "(or set XICON_MODELS_DIR). Or try --preset tiny.",
            field="models_dir",
        )
    return {component: path for component, path in found.items() if path is not None}


def assemble(
    pipeline: str,
    states: Mapping[str, State],
    tokenizer: Tokenizer,
    sources: dict[str, str],
    options: LoadOptions,
    *,
    vision_heads: int | None = None,
    merged: Sequence[Mapping[str, Any]] = (),
) -> Components[Any]:
    """Returns components from the tensors of their files.

    Args:
        pipeline: as "scail".
        states: component -> tensors under any published naming.
        tokenizer: that of the text encoder.
        sources: component -> file, for reports.
        options: where and how.
        vision_heads: heads of the CLIP tower if its width is that of no published one.
        merged: LoRAs that the transformer's file holds already: name and strength of each.
    """
    notes: list[str] = []
    transformer = _load_transformer(pipeline, states["transformer"], options, notes)
    image_encoder = None
    if "image_encoder" in states:
        image_encoder = _load_image(states["image_encoder"], options, vision_heads)
    parts: Components[Any] = Components(
        transformer,
        _load_vae(states["vae"], options),
        _load_text(states["text_encoder"], options),
        image_encoder,
        tokenizer,
        device=options.device,
        plan=options.plan,
        sources=sources,
        notes=notes,
        load_notes=tuple(notes),
        merged={str(lora["name"]): float(lora["strength"]) for lora in merged},
    )
    set_loras(parts, options)
    return parts


def find_lora(name: str, search_dirs: tuple[Path, ...]) -> Path:
    """Returns the file of a LoRA: a path, or a bare name in the places of the weights.

    Raises:
        WeightsError: it is nowhere; says where it was looked for.
    """
    found = Path(name) if Path(name).is_file() else locate_named("lora", name, search_dirs)
    if found is not None:
        return found
    searched = ", ".join(str(folder) for folder in search_dirs) or "no folder"
    raise WeightsError(
        f"LoRA {name!r} was not found (searched: {searched}); give its path, name its folder with "
        "--models-dir, or use --lora none",
        field="loras",
        code="LORA_NOT_FOUND",
    )


def set_loras(parts: Components[Any], options: LoadOptions) -> None:
    """Puts the LoRAs of the options on the transformer, and no others.

    The first call also stores the weights as the options say. LoRAs that are merged into the file
    are not added again.

    Raises:
        WeightsError: a LoRA is missing or fits nowhere, or the ones before cannot be taken off.
    """
    files = []
    for name, strength in options.loras:
        path = find_lora(name, options.search_dirs)
        if path.name in parts.merged:
            _check_merged(parts, path.name, strength)
            continue
        files.append((_read_lora(parts, path), strength))
    if "storage" in parts.facts:
        report = swap_loras(parts.transformer, files, options.lora_mode)
    else:
        report = apply_storage(
            parts.transformer,
            options.storage,
            files,
            lora_mode=options.lora_mode,
            matmul=options.matmul,
            device=options.device,
        )
    parts.facts["storage"] = report.as_dict()
    parts.facts["merged_loras"] = dict(parts.merged)
    parts.notes[:] = [*parts.load_notes, *report.lora_warnings]


def _check_merged(parts: Components[Any], name: str, strength: float) -> None:
    if not math.isclose(parts.merged[name], strength):
        raise WeightsError(
            f"LoRA {name!r} is merged into {parts.sources['transformer']} at strength "
            f"{parts.merged[name]:g} and cannot be changed to {strength:g}; use the strength of "
            "the file, or the file that it was prepared from",
            field="loras",
        )


def _read_lora(parts: Components[Any], path: Path) -> LoraFile:
    """Returns a LoRA; the same object for the same file, which is then not put on twice."""
    key = f"{path}:{path.stat().st_mtime_ns}"
    if key not in parts.lora_files:
        parts.lora_files[key] = LoraFile(path.name, read_lora(read_tensors(open_checkpoint(path))))
    return parts.lora_files[key]


def _load_transformer(
    pipeline: str, published: State, options: LoadOptions, notes: list[str]
) -> WanTransformer:
    state = to_wan_names(published)
    with torch.device("meta"):
        model = transformer_class(pipeline)(wan.config_from_shapes(_shapes(state)))
    policy = dit_policy(options.dtype)
    report = load_strict(model, state, name="transformer", device=options.home, dtype_policy=policy)
    if report.fp8 and options.storage == "reference":
        notes.append(f"{len(report.fp8)} linear layers of the transformer stay fp8")
    model.attention_request = options.attention
    return model.eval()


def _load_vae(published: State, options: LoadOptions) -> vae.WanVAE:
    state = to_vae_names(published)
    with torch.device("meta"):
        model = vae.WanVAE(vae.config_from_shapes(_shapes(state)))
    policy = DtypePolicy(options.encoder_dtype, keep_fp8=False)
    load_strict(model, state, name="vae", device=options.home, dtype_policy=policy)
    return model.eval().to_channels_last()


def _load_text(published: State, options: LoadOptions) -> nn.Module:
    state = map_text_encoder(published, dtype=options.encoder_dtype)
    with torch.device("meta"):
        module = text.build_text_encoder(text.config_from_shapes(_shapes(state)))
    return _load_encoder(module, state, "text_encoder", options)


def _load_image(published: State, options: LoadOptions, num_heads: int | None) -> nn.Module:
    state = map_image_encoder(published)
    with torch.device("meta"):
        config = vision.config_from_shapes(_shapes(state), num_heads=num_heads)
        module = vision.build_image_encoder(config)
    return _load_encoder(module, state, "image_encoder", options)


def _load_encoder(module: nn.Module, state: State, name: str, options: LoadOptions) -> nn.Module:
    policy = DtypePolicy(options.encoder_dtype, keep_fp8=False)
    load_strict(module, state, name=name, device=options.home, dtype_policy=policy)
    return module.eval()


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
