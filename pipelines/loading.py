"""From files to the networks of a pipeline: found, read, checked, assembled.

Every component goes the same way, real or tiny: tensors under the published names, renamed to the
module's own, sizes read from the shapes, module built on the meta device, tensors assigned by
name with nothing missing and nothing left over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines import tiny
from pipelines.components import Components
from pipelines.fusing import fuse_projections
from pipelines.load_loras import find_lora as find_lora
from pipelines.load_loras import set_loras as set_loras
from pipelines.memory_plan import MemoryPlan
from pipelines.prepared import describe, open_transformer
from pipelines.storage import Storage
from pipelines.tiny_trained import FILES, trained_states
from xicon_infer.ahead import Later
from xicon_infer.errors import WeightsError
from xicon_infer.models import text, tiny_decoder, vae, vision, wan
from xicon_infer.models.tiny_decoder import TinyDecoder, decoder_state
from xicon_infer.models.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_bytes
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.cudnn import trap_here
from xicon_infer.ops.linear import Matmul
from xicon_infer.types import SilentProgress
from xicon_infer.weights.checkpoint import Checkpoint, open_checkpoint
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
    missing_message,
    optional_files,
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
    fastest. kernels: between the products, see `xicon_infer.ops.fused_choice`. loras: names or
    paths with strengths. lora_mode: see `xicon_infer.ops.lora`. storage, matmul: how the
    transformer's weights lie and multiply, see `pipelines.storage`. fuse_qkv: see
    `pipelines.fusing`. decoder: "tiny" for the small one, for drafts. transformer: a file in place
    of that of the preset. search_dirs: folders with weights. plan: where the networks lie while
    they work; None for all on the device. ahead: the transformer is read in a thread, last, while
    the encoders work.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    attention: str = "auto"
    kernels: str = "auto"
    loras: tuple[tuple[str, float], ...] = ()
    lora_mode: Literal["full", "merge", "comfy_unmerged"] = "full"
    storage: Storage = "reference"
    matmul: Matmul | Literal["auto"] = "auto"
    fuse_qkv: Literal["auto", "on", "off"] = "auto"
    decoder: Literal["vae", "tiny"] = "vae"
    transformer: Path | None = None
    search_dirs: tuple[Path, ...] = ()
    plan: MemoryPlan | None = None
    ahead: bool = False

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
    """Returns the tiny components of a pipeline: real classes, small.

    Transformer and VAE of SCAIL are trained and shipped; all other weights are generated.

    Args:
        pipeline: as "scail".
        options: where and how; float32 on the CPU if None.
    """
    config = _TINY[pipeline]
    states: dict[str, State] = {"text_encoder": tiny.tiny_text_state()}
    if pipeline == "scail":
        states |= trained_states()
    else:
        states["transformer"] = tiny.tiny_transformer_state(transformer_class(pipeline), config)
        states["vae"] = tiny.tiny_vae_state()
    if config.image_dim is not None:
        states["image_encoder"] = tiny.tiny_vision_state()
    options = options or LoadOptions()
    if options.decoder == "tiny":
        states["preview"] = tiny.tiny_decoder_state()
    sources = dict.fromkeys((*states, "tokenizer"), f"tiny {pipeline}, generated")
    if pipeline == "scail":
        sources |= {name: str(path) for name, path in FILES.items()}
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
    if options.decoder == "tiny":
        paths["preview"] = find_preview(options.search_dirs)
        checkpoints["preview"] = open_checkpoint(paths["preview"])
    large = checkpoints.pop("transformer")
    prepared = describe(large)
    states = {name: read_state(checkpoint, options) for name, checkpoint in checkpoints.items()}
    embedded = sentencepiece_bytes(states["text_encoder"])
    tokenizer = (
        load_tokenizer(paths["tokenizer"])
        if "tokenizer" in paths
        else tokenizer_from_bytes(embedded or b"", source=str(paths["text_encoder"]))
    )
    sources = {name: str(path) for name, path in paths.items()}
    merged = () if prepared is None else tuple(prepared.loras)

    def read(look: Callable[[], None]) -> State:
        return read_state(large, options, look)

    return assemble(
        pipeline, states, tokenizer, sources, options, merged=merged, read_transformer=read
    )


def read_state(
    checkpoint: Checkpoint, options: LoadOptions, look: Callable[[], None] | None = None
) -> State:
    """Returns the tensors of a file where they are wanted; quantised ones of GGUF are unpacked.

    `look` is called after every read and may raise to stop.
    """
    progress = None if look is None else Looking(look)
    return stream_tensors(checkpoint, device=options.home, dtype=options.dtype, progress=progress)


class Looking(SilentProgress):
    """A `Progress` that shows nothing and looks whether it should stop."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Looks."""
        self._look()


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
    read_transformer: Callable[[Callable[[], None]], State] | None = None,
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
        read_transformer: returns its tensors, if they are not in `states`; in a thread and last if
            the options say so. It is given what to call often, to stop.
    """
    notes: list[str] = []
    image_encoder = None
    if "image_encoder" in states:
        image_encoder = _load_image(states["image_encoder"], options, vision_heads)
    parts: Components[Any] = Components(
        None,
        _load_vae(states["vae"], options, notes),
        _load_text(states["text_encoder"], options),
        image_encoder,
        tokenizer,
        device=options.device,
        plan=options.plan,
        sources=sources,
        notes=notes,
        merged={str(lora["name"]): float(lora["strength"]) for lora in merged},
    )
    if "preview" in states:
        parts.preview = _load_preview(states["preview"], options)
    parts.facts["decoder"] = options.decoder

    def finish(look: Callable[[], None]) -> WanTransformer:
        published = states["transformer"] if read_transformer is None else read_transformer(look)
        look()
        transformer = _load_transformer(pipeline, published, options, notes)
        parts.load_notes = tuple(notes)
        set_loras(parts, options, transformer)
        parts.facts["fused_qkv"] = fuse_projections(
            transformer, options.fuse_qkv, device=options.device, resident=parts.resident
        )
        return transformer

    if options.ahead and read_transformer is not None:
        parts.come(Later(finish))
    else:
        parts.transformer = finish(lambda: None)
    return parts


def find_preview(search_dirs: tuple[Path, ...]) -> Path:
    """Returns the file of the small decoder for drafts.

    Raises:
        WeightsError: it is nowhere; says where it was looked for and how to get it.
    """
    (entry,) = optional_files("preview")
    found = locate(entry, search_dirs)
    if found is not None:
        return found
    raise WeightsError(
        f"'decoder' tiny: {missing_message(entry, search_dirs)} One command gets it: "
        f"{fetch_command([entry])} ; or use --decoder vae",
        field="decoder",
    )


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
    model.attention_request, model.kernels_request = options.attention, options.kernels
    return model.eval()


def _load_vae(published: State, options: LoadOptions, notes: list[str]) -> vae.WanVAE:
    if options.encoder_dtype != torch.float32 and (trap := trap_here(options.device.type)):
        notes.append(trap)
    state = to_vae_names(published)
    with torch.device("meta"):
        model = vae.WanVAE(vae.config_from_shapes(_shapes(state)))
    policy = DtypePolicy(options.encoder_dtype, keep_fp8=False)
    load_strict(model, state, name="vae", device=options.home, dtype_policy=policy)
    return model.eval().to_channels_last()


def _load_preview(published: State, options: LoadOptions) -> TinyDecoder:
    state = decoder_state(published)
    with torch.device("meta"):
        model = TinyDecoder(tiny_decoder.config_from_shapes(_shapes(state)))
    policy = DtypePolicy(options.encoder_dtype, keep_fp8=False)
    load_strict(model, state, name="preview", device=options.home, dtype_policy=policy)
    return model.eval().to(memory_format=torch.channels_last)


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
