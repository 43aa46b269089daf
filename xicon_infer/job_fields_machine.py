"""The options of device, precision, kernels and memory. They change the picture by rounding only.

A part of the table in `xicon_infer.job_fields`, which all others read.
"""

from __future__ import annotations

from xicon_infer.job_field import VIDEO, Field, choice_of, only

ATTENTION_KERNELS = ("flash3", "flash2", "cudnn", "flash", "efficient", "xformers", "math")

_DTYPE_HELP = "precision of the computation; auto: bf16 on a GPU, fp32 on the CPU"
_ATTENTION_HELP = "attention kernel; auto: the fastest that runs"
_BATCHING_HELP = "the guidance branches in one forward pass, or one after the other"
_STORAGE_HELP = (
    "how the transformer's weights lie in memory; auto: as the file has them (reference), or as "
    "the memory plan wants; merged-bf16, merged-fp8: LoRAs added once, one scale per row"
)
_MATMUL_HELP = (
    "how fp8 layers multiply; auto: bf16 products, but fp8 ones with --storage merged-fp8 where "
    "the GPU can"
)
_MEMORY_HELP = (
    "resident: all on the GPU; offload: one network at a time; stream: blocks of the transformer "
    "come and go too; auto: the first that fits"
)
_SWAP_HELP = "blocks that come and go with --memory stream; auto: as few as fit"

_TRANSFORMER_HELP = (
    "file of the transformer in place of that of the preset: any format that `xicon-infer weights "
    "inspect` reads, or a prepared one"
)

STORAGE: tuple[Field, ...] = (
    Field("transformer", "path", "model", _TRANSFORMER_HELP),
    choice_of("storage", "model", _STORAGE_HELP, "auto", "reference", "merged-bf16", "merged-fp8"),
    choice_of(
        "matmul", "model", _MATMUL_HELP, "auto", "dequant", "scaled_mm_row", "scaled_mm_tensor"
    ),
)

MACHINE: tuple[Field, ...] = (
    choice_of("device", "machine", "where to compute", "auto", "cuda", "cpu"),
    *only(
        VIDEO,
        choice_of("dtype", "machine", _DTYPE_HELP, "auto", "bf16", "fp16", "fp32"),
        choice_of("attention", "machine", _ATTENTION_HELP, "auto", *ATTENTION_KERNELS),
        choice_of("guidance_batching", "machine", _BATCHING_HELP, "auto", "batched", "sequential"),
        choice_of("memory", "machine", _MEMORY_HELP, "auto", "resident", "offload", "stream"),
        Field("blocks_to_swap", "integer", "machine", _SWAP_HELP, "auto", 0, 40, also=("auto",)),
    ),
)
