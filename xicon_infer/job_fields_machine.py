"""The options of device, precision, kernels and memory. They change the picture by rounding only.

A part of the table in `xicon_infer.job_fields`, which all others read.
"""

from __future__ import annotations

from xicon_infer.job_field import VIDEO, Field, choice_of, only

ATTENTION_POLICIES = ("auto", "auto8", "ordered")
ATTENTION_KERNELS = (
    *("flash3", "flash2", "torch_flash3", "torch_flash4", "cudnn", "flash", "efficient"),
    *("xformers", "sdpa", "math", "sage", "int8"),
)

_DTYPE_HELP = "precision of the computation; auto: bf16 on a GPU, fp32 on the CPU"
_ATTENTION_HELP = (
    "attention kernel; auto: on a GPU the fastest, timed once and remembered; auto8: also of those "
    "with 8-bit scores (sage, int8); ordered: the first that runs, nothing is timed"
)
_KERNELS_HELP = (
    "what runs between the products of a block; eager: PyTorch; triton: own kernels; compile: "
    "torch.compile, slow at first; auto: triton on a GPU where it runs"
)
_FUSE_HELP = (
    "q, k and v of self-attention as one product; auto: with kernels of Triton, all networks on "
    "the GPU and no LoRA beside the weights"
)
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

_CHUNK_HELP = (
    "latent frames that the VAE encodes or decodes at once: more is faster and takes more memory; "
    "auto: by the size and the free memory"
)
_SEARCH_HELP = (
    "let cuDNN time its kernels for the VAE at the first job of a size; for many jobs of one size"
)
_DECODER_HELP = (
    "what makes pictures of latents; tiny: a small network (TAEHV) for quick drafts, softer than "
    "the VAE"
)

STORAGE: tuple[Field, ...] = (
    Field("transformer", "path", "model", _TRANSFORMER_HELP),
    choice_of("storage", "model", _STORAGE_HELP, "auto", "reference", "merged-bf16", "merged-fp8"),
    choice_of(
        "matmul", "model", _MATMUL_HELP, "auto", "dequant", "scaled_mm_row", "scaled_mm_tensor"
    ),
    choice_of("fuse_qkv", "model", _FUSE_HELP, "auto", "on", "off"),
    choice_of("decoder", "model", _DECODER_HELP, "vae", "tiny"),
)

MACHINE: tuple[Field, ...] = (
    choice_of("device", "machine", "where to compute", "auto", "cuda", "cpu"),
    *only(
        VIDEO,
        choice_of("dtype", "machine", _DTYPE_HELP, "auto", "bf16", "fp16", "fp32"),
        choice_of("attention", "machine", _ATTENTION_HELP, *ATTENTION_POLICIES, *ATTENTION_KERNELS),
        choice_of("kernels", "machine", _KERNELS_HELP, "auto", "eager", "triton", "compile"),
        choice_of("guidance_batching", "machine", _BATCHING_HELP, "auto", "batched", "sequential"),
        choice_of("memory", "machine", _MEMORY_HELP, "auto", "resident", "offload", "stream"),
        Field("blocks_to_swap", "integer", "machine", _SWAP_HELP, "auto", 0, 40, also=("auto",)),
        Field("vae_chunk", "integer", "machine", _CHUNK_HELP, "auto", 1, 16, also=("auto",)),
        Field("cudnn_benchmark", "switch", "machine", _SEARCH_HELP, False),
    ),
)
