"""Compares the predicted memory of each stage with the real peak on a GPU.

Random weights of the real sizes; the transformer's stages and decoding run as the memory plan says.
On a machine without a GPU it refuses: a peak of the CPU says nothing about one. Writes one JSON
file. With --table it writes the table of docs/low-memory.md instead, which needs no GPU.

    python -m benchmarks.memory --job "SCAIL 512x896" --memory stream
    python -m benchmarks.memory --table
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.memory import CONTEXT_BYTES, REQUESTS, Allowed, MemoryPlan, choose_memory
from pipelines.memory_needs import DECODE, PROJECT, SAMPLE, Workload, needs_of
from pipelines.plan_memory import TABLE_JOBS, low_memory_table
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.vae import VAEConfig, WanVAE
from xicon_infer.models.wan import WanConfig, WanTransformer
from xicon_infer.ops.linear import replace_linears
from xicon_infer.ops.offload import BlockSwap, projecting, streaming
from xicon_infer.ops.placing import KV_PROJECTIONS, kv_layers, placed, tensors_of
from xicon_infer.types import latent_frames

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "low-memory.md"
JOBS = {name: work for name, work in TABLE_JOBS.items() if work.pipeline != "steady_dancer"}

Peak = Callable[[Callable[[], Any]], tuple[int, Any]]
"""Runs something; returns the most bytes that were on the device, and the result."""


def main() -> None:
    """Runs what the command line asks for."""
    args = parse()
    if args.table:
        write_table()
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.memory needs a CUDA device: a peak of the CPU says nothing about one")
    # LoRAs are left out: their files are not here.
    work = replace(JOBS[args.job], lora_rank=0)
    if args.frames:
        work = replace(work, num_frames=args.frames)
    device = torch.device("cuda")
    free, total = torch.cuda.mem_get_info()
    plan = choose_memory(
        lambda storage: needs_of(work, storage),
        free_bytes=free,
        request=args.memory,
        allow=Allowed(blocks_to_swap=args.blocks_to_swap),
    )
    real = measure(plan, device, cuda_peak)
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "total_bytes": total,
        "context_bytes": {"assumed": CONTEXT_BYTES, "real": total - free},
        "mode": plan.mode,
        "blocks_to_swap": plan.blocks_to_swap,
        "tokens": work.tokens,
        "stages": compare(plan, real),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }
    path = args.out / f"memory_{work.pipeline}_{plan.mode}_{work.num_frames}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"written to {path}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--job", choices=JOBS, default=next(iter(JOBS)))
    parser.add_argument("--frames", type=int, help="4n + 1; default 81")
    parser.add_argument("--memory", choices=REQUESTS, default="auto")
    parser.add_argument("--blocks-to-swap", type=_swapped, default="auto")
    parser.add_argument("--table", action="store_true", help="write the table of the docs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def _swapped(text: str) -> int | str:
    return text if text == "auto" else int(text)


def write_table() -> None:
    """Writes the table into the page, between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("--table -->\n")
    _, mark, after = rest.partition("<!-- end -->")
    PAGE.write_text(f"{before}--table -->\n{low_memory_table()}{mark}{after}", encoding="utf-8")


def compare(plan: MemoryPlan, real: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Returns predicted and real bytes of each measured stage, and their quotient.

    With everything resident the encoders are counted by the plan and not built here: their
    weights are subtracted.
    """
    absent = 0
    if plan.mode == "resident":
        absent = plan.needs.weights["text_encoder"] + plan.needs.weights["image_encoder"]
    found = {}
    for stage, peak in real.items():
        predicted = plan.peak_bytes[stage] - absent
        found[stage] = {"predicted": predicted, "real": peak, "ratio": round(peak / predicted, 3)}
    return found


def cuda_peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Runs something; returns the peak of allocated device memory and the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()), result


@torch.inference_mode()
def measure(plan: MemoryPlan, device: torch.device, peak: Peak) -> dict[str, int]:
    """Returns the real peak of each stage that needs no encoder, run as the plan says.

    Args:
        plan: of a SCAIL or Wan job.
        device: where to run.
        peak: how to measure.
    """
    work = plan.needs.work
    model, vae = build_transformer(work), build_vae(work)
    with ExitStack() as stack:
        if plan.mode == "resident":
            tensors = [*tensors_of(model), *tensors_of(vae)]
            stack.enter_context(placed(tensors, device))
        peaks = {}
        peaks[PROJECT], told = peak(lambda: project(model, work, plan, device))
        peaks[SAMPLE], latents = peak(lambda: predict(model, work, plan, told))
        peaks[DECODE], _ = peak(lambda: decode(vae, latents, plan, device))
    return peaks


def project(
    model: WanTransformer, work: Workload, plan: MemoryPlan, device: torch.device
) -> dict[str, Any]:
    """Returns what the transformer is told, in its own terms."""
    dit = work.dit
    text = torch.randn(dit.text_tokens, dit.text_dim)
    image = torch.randn(1, dit.image_tokens, dit.image_dim) if dit.image_tokens else None
    frames, rows, columns = grid(work)
    with ExitStack() as stack:
        if plan.free_kv_weights:
            layers = kv_layers(model.layers)
            swap = BlockSwap(layers, len(layers), device)
            stack.callback(swap.close)
            stack.enter_context(projecting(model, model.layers, swap))
        told: dict[str, Any] = {"context": model.encode_context([text], image)}
        if isinstance(model, ScailTransformer):
            half = torch.randn(1, 16, frames, rows // 2, columns // 2)
            told["reference"] = model.embed_reference(torch.randn(1, 16, 1, rows, columns))
            told["pose"] = model.embed_pose(half)
        elif work.pipeline == "wan_i2v":
            told["condition"] = torch.randn(1, 20, frames, rows, columns, device=device)
    return told


def predict(
    model: WanTransformer, work: Workload, plan: MemoryPlan, told: dict[str, Any]
) -> Tensor:
    """Returns latents after two forward passes."""
    device = told["context"][0].k.device
    latents = torch.randn(1, 16, *grid(work), device=device)
    with ExitStack() as stack:
        if plan.free_kv_weights:
            swap = BlockSwap(model.layers, plan.blocks_to_swap, device, aside=KV_PROJECTIONS)
            stack.callback(swap.close)
            stack.enter_context(streaming(model, swap))
        for timestep in (999.0, 500.0):
            latents = latents - 0.1 * model(
                latents, torch.tensor([timestep], device=device), **told
            )
    return latents


def decode(vae: WanVAE, latents: Tensor, plan: MemoryPlan, device: torch.device) -> int:
    """Returns the number of decoded frames."""
    with ExitStack() as stack:
        if plan.mode != "resident":
            stack.enter_context(placed(tensors_of(vae), device))
        pieces = vae.iter_decode(vae.denormalize(latents), chunk=plan.vae_chunk)
        return sum(_frames(pieces))


def _frames(pieces: Iterator[Tensor]) -> Iterator[int]:
    for piece in pieces:
        frames = piece.shape[2]
        del piece
        yield frames


def grid(work: Workload) -> tuple[int, int, int]:
    """Returns (T, rows, columns) of the latents."""
    return latent_frames(work.num_frames), work.height // 8, work.width // 8


def build_transformer(work: Workload) -> WanTransformer:
    """Returns a transformer of the job's size on the host, random weights, fp8 like its file."""
    dit = work.dit
    config = WanConfig(
        dim=dit.dim,
        ffn_dim=dit.ffn_dim,
        num_heads=dit.heads,
        num_layers=dit.layers,
        in_dim=dit.in_channels,
        text_dim=dit.text_dim,
        text_len=dit.text_tokens,
        image_dim=dit.image_dim if dit.image_tokens else None,
    )
    with torch.device("meta"):
        model = (ScailTransformer if work.pipeline == "scail" else WanTransformer)(config)
    if work.fp8_file:
        names = [name for name, _ in model.named_parameters() if name.startswith("blocks.")]
        replace_linears(model, dict.fromkeys(names, torch.float8_e4m3fn), {})
    return fill(model, torch.float32 if work.element_bytes == 4 else torch.bfloat16)


def build_vae(work: Workload) -> WanVAE:
    """Returns a VAE of the job's size on the host, random weights."""
    with torch.device("meta"):
        vae = WanVAE(VAEConfig(dim=work.vae.base, z_dim=work.vae.z), fast=True)
    return fill(vae, torch.float32 if work.element_bytes == 4 else torch.bfloat16)


def fill(module: Any, dtype: torch.dtype) -> Any:
    """Returns the module on the host in a dtype, fp8 weights apart, with random numbers."""
    module = module.to_empty(device="cpu").to(dtype).eval().requires_grad_(False)
    assert isinstance(module, nn.Module)
    for tensor in tensors_of(module):
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).random_(0, 64)  # finite numbers below 1
        else:
            tensor.normal_(0, 0.02)
    return module


if __name__ == "__main__":
    main()
