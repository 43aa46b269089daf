"""The memory plan of a job on a named card, for `--dry-run`, and the table of docs/low-memory.md.

Everything here is predicted from closed forms; loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

from pipelines.memory import (
    CONTEXT_BYTES,
    Allowed,
    MemoryPlan,
    Request,
    choose_memory,
)
from pipelines.memory_needs import Pipeline, Storage, Workload, needs_of
from xicon_infer import formulas
from xicon_infer.errors import OutOfMemory
from xicon_infer.formulas import DitShape
from xicon_infer.formulas_memory import STEADY_DANCER_EXTRA_PARAMETERS
from xicon_infer.formulas_vae import VaeShape
from xicon_infer.gpus import Gpu, find_gpu
from xicon_infer.job import Job

LORA_RANK = 64
"""Of every LoRA whose file is not read for a plan; the published distillations have it."""

TABLE_CARDS = (
    "8GB",
    "12GB",
    "RTX 4080",
    "RTX 4090",
    "RTX 5090",
    "A100 40GB",
    "L40S",
    "H100 80GB",
    "H200",
)

_WAN_14B = formulas.WAN_I2V_14B
TABLE_JOBS: Mapping[str, Workload] = MappingProxyType(
    {
        "SCAIL 512x896": Workload(
            "scail", 512, 896, 81, formulas.SCAIL_14B, fp8_file=True, lora_rank=LORA_RANK
        ),
        "SteadyDancer 480x832": Workload(
            "steady_dancer",
            480,
            832,
            81,
            _WAN_14B,
            fp8_file=True,
            lora_rank=LORA_RANK,
            extra_parameters=STEADY_DANCER_EXTRA_PARAMETERS,
        ),
        "Wan I2V 14B 832x480": Workload("wan_i2v", 832, 480, 81, _WAN_14B, fp8_file=True),
        "Wan T2V 1.3B 832x480": Workload(
            "wan_t2v", 832, 480, 81, formulas.WAN_T2V_1_3B, image_parameters=0
        ),
    }
)
"""Jobs of 81 frames at the usual sizes, without guidance."""


class Sizes(Protocol):
    """The sizes of a job as its plan has them."""

    @property
    def dit(self) -> DitShape:
        """The transformer."""

    @property
    def vae(self) -> VaeShape:
        """The VAE."""

    @property
    def width(self) -> int:
        """Pixels."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def num_frames(self) -> int:
        """Pixel frames."""

    @property
    def matrix_bytes(self) -> int:
        """Per weight of a block matrix of the file; 1 is fp8."""

    @property
    def element_bytes(self) -> int:
        """Per number of the compute dtype."""


def workload_of(
    job: Job,
    sizes: Sizes,
    pipeline: Pipeline,
    *,
    window: int | None,
    batch: int,
    kept_tokens: int = 0,
) -> Workload:
    """Returns a job in numbers.

    Args:
        job: the job.
        sizes: of its plan.
        pipeline: which model's tokens are counted.
        window: pixel frames of a context window, None if all frames go at once.
        batch: samples in one forward pass: 2 where both branches of the guidance share one.
        kept_tokens: those that a step cache keeps.
    """
    tiny = job.preset == "tiny"
    beside = job.lora_mode != "merge"
    dancer = pipeline == "steady_dancer" and not tiny
    work = Workload(
        pipeline,
        sizes.width,
        sizes.height,
        sizes.num_frames,
        sizes.dit,
        vae=sizes.vae,
        window=window,
        element_bytes=sizes.element_bytes,
        fp8_file=sizes.matrix_bytes == 1,
        contexts=2 if job.guided else 1,
        batch=batch,
        kept_tokens=kept_tokens,
        lora_rank=LORA_RANK * len(job.loras) if beside else 0,
        tile=(job.tile_width, job.tile_height),
        stride=(job.tile_stride_width, job.tile_stride_height),
        vae_chunk=None if job.vae_chunk == "auto" else job.vae_chunk,
        extra_parameters=STEADY_DANCER_EXTRA_PARAMETERS if dancer else 0,
    )
    if tiny:  # its encoders are below a megabyte
        return replace(work, text_parameters=0, image_parameters=0)
    return work if sizes.dit.image_tokens else replace(work, image_parameters=0)


def memory_for(
    work: Workload, gpu: str, *, request: Request = "auto", allow: Allowed | None = None
) -> MemoryPlan:
    """Returns the memory plan of a job on a card.

    Args:
        work: the job in numbers.
        gpu: a name or a size, as `find_gpu` takes it.
        request: "auto", or the one way to use.
        allow: limits of the user.

    Raises:
        InvalidRequest: there is no such card, or the options contradict each other.
        OutOfMemory: the job does not fit; says what would.
    """
    card = find_gpu(gpu)
    free = card.memory_bytes - CONTEXT_BYTES
    if free <= 0:
        raise OutOfMemory(f"'gpu' {gpu!r}: the CUDA context alone fills it", field="gpu")
    return choose_memory(
        lambda storage: needs_of(work, storage), free_bytes=free, request=request, allow=allow
    )


def memory_lines(plan: MemoryPlan, gpu: str) -> list[str]:
    """Returns the plan as lines for the terminal; the first names card, mode and peak.

    Args:
        plan: as `memory_for` gives it.
        gpu: the card, as it was asked for.
    """
    return list(_lines(plan, find_gpu(gpu)))


def _lines(plan: MemoryPlan, card: Gpu) -> Iterator[str]:
    stage, peak = max(plan.peak_bytes.items(), key=lambda item: item[1])
    yield (
        f"{card.name}: {plan.mode}, storage {plan.storage}, at most {_gb(peak)} of "
        f"{_gb(card.memory_bytes)} (to {stage}); predicted"
    )
    if plan.stream_encoder:
        yield "The blocks of the text encoder are swapped too."
    if plan.host_bytes:
        yield f"{_gb(plan.host_bytes)} of host memory hold the weights that wait."
    if not card.bf16:
        yield f"{card.name} has no bfloat16 arithmetic; use --dtype fp16."
    yield from plan.why


def low_memory_table() -> str:
    """Returns the table of docs/low-memory.md: what each card does with each pipeline's job."""
    rows = [
        "| card | " + " | ".join(TABLE_JOBS) + " |",
        "|---" * (len(TABLE_JOBS) + 1) + "|",
    ]
    for name in TABLE_CARDS:
        cells = [_cell(work, name) for work in TABLE_JOBS.values()]
        rows.append(f"| {find_gpu(name).name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _cell(work: Workload, gpu: str, storages: tuple[Storage, ...] = ("reference",)) -> str:
    try:
        plan = memory_for(work, gpu, allow=Allowed(storages=storages))
    except OutOfMemory:
        return "does not fit"
    swapped = f" {plan.blocks_to_swap}/{plan.needs.blocks}" if plan.blocks_to_swap else ""
    stays = "*" if plan.keep_transformer else ""
    return f"{plan.mode}{stays}{swapped}, {_gb(plan.peak)}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
