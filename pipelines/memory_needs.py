"""What a job needs of the device's memory, in closed form: the raw material of `pipelines.memory`.

A `Workload` is the job in numbers; `needs_of` turns it into bytes for one way of storing the
transformer. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xicon_infer import formulas, formulas_memory, formulas_vae
from xicon_infer.formulas import DitShape
from xicon_infer.formulas_vae import VaeShape
from xicon_infer.types import latent_frames

Storage = Literal["reference", "merged-bf16", "merged-fp8"]
"""As `pipelines.storage`, which imports PyTorch; a test compares them."""

Pipeline = Literal["scail", "steady_dancer", "wan_i2v", "wan_t2v"]

TEXT = "encode text"
IMAGE = "encode image"
FRAMES = "encode frames"
PROJECT = "project conditioning"
SAMPLE = "sample"
DECODE = "decode video"

COMPONENT_OF: Mapping[str, str] = {
    TEXT: "text_encoder",
    IMAGE: "image_encoder",
    FRAMES: "vae",
    PROJECT: "transformer",
    SAMPLE: "transformer",
    DECODE: "vae",
}
"""Stage -> the component that works in it, in the order of the recipes."""

# As pipelines.frames, which imports PyTorch: latent frames that the VAE handles at once.
PIECE_PIXELS = 2**19
MAX_PIECE = 4


@dataclass(frozen=True)
class Workload:
    """The job in numbers.

    window: pixel frames of a context window, None where all frames go at once. element_bytes: of
    the compute dtype. fp8_file: the block matrices of the file are fp8. contexts: conditionings
    whose keys and values are kept: 2 with guidance. batch: samples in one forward pass.
    kept_tokens: those that a step cache keeps, of all branches and windows. lora_rank: of all
    LoRAs together. tile, stride: (width, height) of VAE tiles and of their distance, pixels.
    extra_parameters: of the transformer beside what `dit` counts. text_parameters,
    image_parameters: of the encoders, 0 for none. vae_chunk: latent frames that the VAE handles at
    once whatever they take, None for as many as fit.
    """

    pipeline: Pipeline
    width: int
    height: int
    num_frames: int
    dit: DitShape
    vae: VaeShape = formulas_vae.WAN_VAE
    window: int | None = None
    element_bytes: int = 2
    fp8_file: bool = False
    contexts: int = 1
    batch: int = 1
    kept_tokens: int = 0
    lora_rank: int = 0
    tile: tuple[int, int] = (272, 272)
    stride: tuple[int, int] = (128, 144)
    extra_parameters: int = 0
    text_parameters: int = formulas.UMT5_PARAMETERS
    image_parameters: int = formulas.CLIP_PARAMETERS
    vae_chunk: int | None = None

    @property
    def latent_frames(self) -> int:
        """Latent frames that one forward pass sees."""
        return latent_frames(min(self.num_frames, self.window or self.num_frames))

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return formulas.frame_tokens(self.width, self.height)

    @property
    def tokens(self) -> int:
        """L of the longest forward pass."""
        frames, hw = self.latent_frames, self.frame_tokens
        if self.pipeline == "scail":
            return formulas.scail_tokens(frames, hw)
        if self.pipeline == "steady_dancer":
            return formulas.steady_dancer_tokens(frames, hw)
        return formulas.wan_tokens(frames, hw)

    @property
    def held_bytes(self) -> int:
        """Bytes of tokens that the model's own code keeps while its blocks run, of one sample.

        SCAIL keeps the noise tokens that it joined; SteadyDancer the whole sequence and its video
        tokens in float32.
        """
        noise = self.latent_frames * self.frame_tokens * self.dit.dim
        if self.pipeline == "scail":
            return noise * self.element_bytes
        if self.pipeline == "steady_dancer":
            return self.tokens * self.dit.dim * self.element_bytes + noise * 4
        return 0

    @property
    def conditioning_tokens(self) -> int:
        """Tokens of reference and pose that are made once and kept for the whole job."""
        hw, frames = self.frame_tokens, latent_frames(self.num_frames)
        return {"scail": hw + frames * hw // 4, "steady_dancer": 2 * hw}.get(self.pipeline, 0)

    @property
    def piece(self) -> int:
        """Latent frames that the VAE handles at once: what was asked for, or if memory allows."""
        if self.vae_chunk is not None:
            return self.vae_chunk
        return max(1, min(MAX_PIECE, PIECE_PIXELS // (self.width * self.height)))


@dataclass(frozen=True)
class Needs:
    """Bytes of a job with its transformer stored in one way.

    weights: component -> bytes of its weights, with the LoRAs beside them. kv_weights: of the
    transformer's, those that only the projection of the conditioning reads; kv_matrix: the largest
    single one. outer: of the transformer's, those outside the blocks. block: of one block that a
    swap copies, without kv_weights; largest_block: where blocks differ. streamed_encoder: of the
    text encoder with its blocks swapped. kv_cache: keys and values of the conditioning.
    conditioning: tokens that are kept for the whole job. stage_work: stage -> bytes of its
    tensors, without the stages of the VAE.
    """

    work: Workload
    storage: Storage
    weights: Mapping[str, int]
    kv_weights: int
    kv_matrix: int
    outer: int
    block: int
    largest_block: int
    streamed_encoder: int
    kv_cache: int
    conditioning: int
    stage_work: Mapping[str, int]

    @property
    def blocks(self) -> int:
        """Returns n, the blocks of the transformer."""
        return self.work.dit.layers

    def decode(self, chunk: int, *, tile: bool) -> int:
        """Returns the bytes of decoding beside the weights, `chunk` latent frames at once."""
        work, size = self.work, (self.work.width, self.work.height)
        latents = formulas_memory.solver_bytes(latent_frames(work.num_frames) * work.frame_tokens)
        common = {"chunk": chunk, "element_bytes": _encoder_bytes(work)}
        if not tile:
            return latents + formulas_memory.vae_decode_bytes(*size, shape=work.vae, **common)
        columns, rows = (
            formulas_vae.tile_spans(side, extent, stride)
            for side, extent, stride in zip(size, work.tile, work.stride, strict=True)
        )
        tiles = [(x1 - x0, y1 - y0) for y0, y1 in rows for x0, x1 in columns]
        tiled = formulas_memory.vae_tiled_decode_bytes(size, tiles, shape=work.vae, **common)
        return latents + tiled

    def encode(self, chunk: int) -> int:
        """Returns the bytes of encoding the recipe's pictures and videos, the largest of them."""
        work = self.work
        size, frames = (work.width, work.height), work.num_frames
        half = (work.width // 2, work.height // 2)
        jobs: Mapping[str, tuple[tuple[tuple[int, int], int], ...]] = {
            "scail": ((size, 1), (half, frames)),
            "steady_dancer": ((size, frames),),
            "wan_i2v": ((size, frames),),
            "wan_t2v": (),
        }
        return max(
            (
                formulas_memory.vae_encode_bytes(
                    *extent,
                    count,
                    chunk=chunk,
                    shape=work.vae,
                    element_bytes=_encoder_bytes(work),
                )
                for extent, count in jobs[work.pipeline]
            ),
            default=0,
        )


def needs_of(work: Workload, storage: Storage) -> Needs:
    """Returns the bytes of a job with its transformer stored in one way.

    In storage "merged-fp8" the first and the last block stay wide; "reference" is fp8 where the
    file is, and has the LoRAs beside the weights.
    """
    dit, element = work.dit, work.element_bytes
    fp8 = storage == "merged-fp8" or (storage == "reference" and work.fp8_file)
    matrix = 1 if fp8 else element
    edges = min(2, dit.layers) if storage == "merged-fp8" else 0
    scales = formulas_memory.row_scale_bytes(dit) if storage == "merged-fp8" else 0
    beside = storage == "reference"
    lora = formulas.lora_bytes(dit, work.lora_rank, element) // dit.layers if beside else 0

    def block(width: int, *, keep: bool) -> int:
        extra = scales if width == 1 else 0
        return extra + lora + formulas_memory.block_bytes(dit, width, element, keep_cross_kv=keep)

    outer = (formulas.outer_parameters(dit) + work.extra_parameters) * element
    every = (dit.layers - edges) * block(matrix, keep=True) + edges * block(element, keep=True)
    kv = formulas.cross_kv_parameters(dit) // dit.layers
    kv_weights = kv * ((dit.layers - edges) * matrix + edges * element)
    encoder = _encoder_bytes(work)
    weights = {
        "transformer": outer + every,
        "vae": formulas_vae.parameters(work.vae) * encoder,
        "text_encoder": work.text_parameters * encoder,
        "image_encoder": work.image_parameters * encoder,
    }
    streamed = min(weights["text_encoder"], formulas_memory.umt5_streamed_parameters() * encoder)
    kv_cache = formulas.cross_kv_bytes(dit, element, work.contexts)
    if work.batch > 1:  # batched guidance keeps the stacked copy beside the single ones
        kv_cache += work.batch * formulas.cross_kv_bytes(dit, element)
    return Needs(
        work=work,
        storage=storage,
        weights=weights,
        kv_weights=kv_weights,
        kv_matrix=dit.dim**2 * (element if edges else matrix),
        outer=outer,
        block=block(matrix, keep=False),
        largest_block=block(element if edges else matrix, keep=False),
        streamed_encoder=streamed,
        kv_cache=kv_cache,
        conditioning=work.conditioning_tokens * dit.dim * element,
        stage_work=_stage_work(work, dequantised=fp8),
    )


def _stage_work(work: Workload, *, dequantised: bool) -> Mapping[str, int]:
    dit, element, encoder = work.dit, work.element_bytes, _encoder_bytes(work)
    noise = latent_frames(work.num_frames) * work.frame_tokens
    forward = formulas_memory.forward_bytes(dit, work.tokens, element, work.batch, work.held_bytes)
    # Beside what it keeps, a step cache holds the tokens that enter the blocks.
    entering = work.batch * work.tokens if work.kept_tokens else 0
    kept = (work.kept_tokens + entering) * dit.dim * element
    widened = formulas_memory.largest_matrix_bytes(dit, element) if dequantised else 0
    return {
        TEXT: formulas_memory.umt5_bytes(dit.text_tokens, encoder) if work.text_parameters else 0,
        IMAGE: formulas_memory.clip_bytes(1, encoder) if work.image_parameters else 0,
        PROJECT: work.contexts * formulas_memory.projection_bytes(dit, element)
        + dit.dim**2 * element,
        SAMPLE: forward + kept + widened + formulas_memory.solver_bytes(noise),
    }


def _encoder_bytes(work: Workload) -> int:
    """Returns the bytes of a number outside the transformer, where float16 is never used."""
    return 4 if work.element_bytes == 4 else 2
