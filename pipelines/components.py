"""The networks of a pipeline: found, read, checked, and moved to the device when they are used.

Every component goes the same way, real or tiny: tensors under the published names, renamed to the
module's own, sizes read from the shapes, module built on the meta device, tensors assigned by
name with nothing missing and nothing left over.

A GPU that cannot hold everything at once holds one component at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipelines import tiny
from xicon_infer.errors import WeightsError
from xicon_infer.models import text, vae, vision, wan
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_bytes
from xicon_infer.ops.lora import apply_loras
from xicon_infer.ops.lora_keys import LoraFile, read_lora
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.detect import detect
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
    missing_message,
)
from xicon_infer.weights.strict import DtypePolicy, dit_policy, load_strict

State = Mapping[str, Tensor]
Part = Literal["transformer", "vae", "text_encoder", "image_encoder"]

WORK_BYTES = 8 * 2**30
"""Device memory left for activations when deciding whether all components stay on the device."""


@dataclass(frozen=True)
class LoadOptions:
    """How components are loaded.

    device, dtype: where and in what precision to compute. attention: kernel, "auto" for the
    fastest. loras: names or paths with strengths. lora_mode: see `xicon_infer.ops.lora`.
    search_dirs: folders with weights.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    attention: str = "auto"
    loras: tuple[tuple[str, float], ...] = ()
    lora_mode: Literal["full", "merge", "comfy_unmerged"] = "full"
    search_dirs: tuple[Path, ...] = ()


@dataclass
class Components:
    """The networks of one pipeline. They lie on the host until `on_device` is entered.

    sources: component -> the file it came from. notes: what loading did beyond the obvious.
    resident: all components stay on the device once they were there.
    """

    transformer: ScailTransformer
    vae: vae.WanVAE
    text_encoder: nn.Module
    image_encoder: nn.Module
    tokenizer: Tokenizer
    device: torch.device
    resident: bool
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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


def load_tiny(pipeline: str, options: LoadOptions | None = None) -> Components:
    """Returns the tiny components of a pipeline: real classes, generated weights.

    Args:
        pipeline: "scail".
        options: where and how; float32 on the CPU if None.
    """
    states = {
        "transformer": tiny.tiny_transformer_state(),
        "vae": tiny.tiny_vae_state(),
        "text_encoder": tiny.tiny_text_state(),
        "image_encoder": tiny.tiny_vision_state(),
    }
    sources = dict.fromkeys((*states, "tokenizer"), f"tiny {pipeline}, generated")
    return assemble(
        states, tiny.tiny_tokens(), sources, options or LoadOptions(), tiny.TINY_VISION.num_heads
    )


def load_preset(pipeline: str, preset: str, options: LoadOptions) -> Components:
    """Returns the components that the manifest lists for a preset, from local files.

    Raises:
        WeightsError: a file is missing (all missing ones are named), damaged, or of another model.
    """
    entries = [e for e in files_for(pipeline, preset) if e.component != "lora"]
    paths = find_files(entries, options.search_dirs)
    checkpoints = {n: open_checkpoint(p) for n, p in paths.items() if n != "tokenizer"}
    states = {name: read_tensors(checkpoint) for name, checkpoint in checkpoints.items()}
    kind = detect(checkpoints["transformer"].shapes).kind
    if kind != pipeline:
        raise WeightsError(
            f"transformer: {paths['transformer'].name} is a {kind} model, the pipeline needs "
            f"{pipeline}; see weights_manifest.json for the right file",
            field="transformer",
        )
    embedded = sentencepiece_bytes(states["text_encoder"])
    tokenizer = (
        load_tokenizer(paths["tokenizer"])
        if "tokenizer" in paths
        else tokenizer_from_bytes(embedded or b"", source=str(paths["text_encoder"]))
    )
    return assemble(states, tokenizer, {n: str(p) for n, p in paths.items()}, options)


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
    states: Mapping[str, State],
    tokenizer: Tokenizer,
    sources: dict[str, str],
    options: LoadOptions,
    vision_heads: int | None = None,
) -> Components:
    """Returns components from the tensors of their files.

    Args:
        states: component -> tensors under any published naming.
        tokenizer: that of the text encoder.
        sources: component -> file, for reports.
        options: where and how.
        vision_heads: heads of the CLIP tower if its width is that of no published one.
    """
    notes: list[str] = []
    # UMT5 overflows in float16, and the VAE was only ever run in bfloat16 or float32.
    encoders = torch.float32 if options.dtype == torch.float32 else torch.bfloat16
    transformer = _load_scail(to_wan_names(states["transformer"]), options, notes)
    autoencoder = _load_vae(to_vae_names(states["vae"]), encoders)
    text_state = map_text_encoder(states["text_encoder"], dtype=encoders)
    image_state = map_image_encoder(states["image_encoder"])
    with torch.device("meta"):
        text_encoder = text.build_text_encoder(text.config_from_shapes(_shapes(text_state)))
        image_encoder = vision.build_image_encoder(
            vision.config_from_shapes(_shapes(image_state), num_heads=vision_heads)
        )
    _load_encoder(text_encoder, text_state, "text_encoder", encoders)
    _load_encoder(image_encoder, image_state, "image_encoder", encoders)
    modules = (transformer, autoencoder, text_encoder, image_encoder)
    return Components(
        transformer,
        autoencoder,
        text_encoder,
        image_encoder,
        tokenizer,
        device=options.device,
        resident=_all_fit(modules, options.device),
        sources=sources,
        notes=notes,
    )


def find_lora(name: str, search_dirs: tuple[Path, ...]) -> Path:
    """Returns the file of a LoRA: a path, or a bare name in a search folder or its `loras`.

    Raises:
        WeightsError: it is nowhere; says where it was looked for.
    """
    places = [Path(name)]
    for folder in search_dirs:
        places += [folder / name, folder / "loras" / name, folder / "models" / "loras" / name]
        places += sorted((folder / "Lightx2v").glob(name))
    for place in places:
        if place.is_file():
            return place
    searched = ", ".join(str(folder) for folder in search_dirs) or "no folder"
    raise WeightsError(
        f"LoRA {name!r} was not found (searched: {searched}); give its path, name its folder with "
        "--models-dir, or use --lora none",
        field="loras",
        code="LORA_NOT_FOUND",
    )


def _load_scail(state: State, options: LoadOptions, notes: list[str]) -> ScailTransformer:
    with torch.device("meta"):
        model = ScailTransformer(wan.config_from_shapes(_shapes(state)))
    policy = dit_policy(options.dtype)
    report = load_strict(model, state, name="transformer", device="cpu", dtype_policy=policy)
    if report.fp8:
        notes.append(f"{len(report.fp8)} linear layers of the transformer stay fp8")
    files = []
    for name, strength in options.loras:
        path = find_lora(name, options.search_dirs)
        deltas = read_lora(read_tensors(open_checkpoint(path)))
        files.append((LoraFile(path.name, deltas), strength))
    if files:
        notes.extend(apply_loras(model, files, options.lora_mode, keep_undo=False).warnings())
    model.attention_request = options.attention
    return model.eval()


def _load_vae(state: State, dtype: torch.dtype) -> vae.WanVAE:
    with torch.device("meta"):
        model = vae.WanVAE(vae.config_from_shapes(_shapes(state)))
    policy = DtypePolicy(dtype, keep_fp8=False)
    load_strict(model, state, name="vae", device="cpu", dtype_policy=policy)
    return model.eval().to_channels_last()


def _load_encoder(module: nn.Module, state: State, name: str, dtype: torch.dtype) -> None:
    policy = DtypePolicy(dtype, keep_fp8=False)
    load_strict(module, state, name=name, device="cpu", dtype_policy=policy)
    module.eval()


def _all_fit(modules: tuple[nn.Module, ...], device: torch.device) -> bool:
    """Returns whether all modules and the work fit on the device together."""
    if device.type != "cuda":
        return True
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    needed = sum(t.numel() * t.element_size() for t in tensors) + WORK_BYTES
    return needed < torch.cuda.get_device_properties(device).total_memory


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
