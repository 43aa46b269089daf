"""From training checkpoints to the files that the tiny preset ships.

    python -m tools.tiny.export --run runs/tiny --out pipelines/tiny_weights

The VAE is written in float16, with the statistics of its latents folded into its first and last
pointwise layers, so that the published means and deviations fit it. The transformer is written as
scaled fp8, with the guard that `xicon-infer weights prepare` has. Both files have the published
tensor names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines.tiny_trained import FILES
from tools.tiny import vae_forward
from tools.tiny.optimise import load_checkpoint
from tools.tiny.train_vae import CONFIG as VAE_CONFIG
from tools.tiny.train_vae import Pool, to_video
from xicon_infer.media.write import atomic_path
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_config import LATENT_MEANS, LATENT_STDS
from xicon_infer.ops.fp8_guard import guarded_quantize, place_reason
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors

STATISTICS_CLIPS = 100
LICENCE = {"licence": "Apache-2.0", "card": "docs/tiny-model.md"}


def load_vae(run: Path) -> WanVAE:
    """Returns the VAE of a run, folded and rounded as it is shipped; writes it on first use.

    Args:
        run: folder with the results of `tools.tiny.train_vae`.

    Raises:
        FileNotFoundError: that training has not run.
    """
    path = run / "vae.safetensors"
    if not path.exists():
        kept, pool = load_checkpoint(run / "vae.pt"), load_checkpoint(run / "pool_train.pt")
        if kept is None or pool is None:
            raise FileNotFoundError(f"no trained VAE in {run}; run python -m tools.tiny.train_vae")
        vae = WanVAE(VAE_CONFIG)
        vae.load_state_dict(kept["average"])
        fold_statistics(vae, *latent_statistics(vae, Pool(pool["frames"], pool["poses"])))
        write_half(path, vae.state_dict(), {"step": str(kept["step"])})
    vae = WanVAE(VAE_CONFIG)
    state = read_tensors(open_checkpoint(path))
    vae.load_state_dict({name: value.float() for name, value in state.items()})
    return vae


@torch.inference_mode()
def latent_statistics(vae: WanVAE, pool: Pool) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation [16] of the latents of pictures and poses."""
    rows = []
    for frames in (pool.frames[:STATISTICS_CLIPS], pool.poses[: STATISTICS_CLIPS // 4]):
        for clip in frames:
            latents = vae_forward.encode(vae, to_video(clip[None]))
            rows.append(latents[0].flatten(1))
    values = torch.cat(rows, dim=1)
    return values.mean(1), values.std(1)


@torch.no_grad()
def fold_statistics(vae: WanVAE, means: Tensor, stds: Tensor) -> None:
    """Changes the latents' scale so that `WanVAE.normalize` makes them mean 0, deviation 1.

    Pictures stay what they were. The rows of the log-variance, which nothing reads, become zero.

    Args:
        vae: changed in place.
        means: of the raw latents [16].
        stds: of the raw latents [16].
    """
    wanted_mean, wanted_std = torch.tensor(LATENT_MEANS), torch.tensor(LATENT_STDS)
    gain = wanted_std / stds
    rows = len(means)
    weight, bias = vae.conv1.weight, vae.conv1.bias
    assert bias is not None
    weight[:rows] *= gain[:, None, None, None, None]
    bias[:rows] = (bias[:rows] - means) * gain + wanted_mean
    weight[rows:], bias[rows:] = 0, 0
    weight, bias = vae.conv2.weight, vae.conv2.bias
    assert bias is not None
    bias += (weight[..., 0, 0, 0] * (means - wanted_mean / gain)).sum(1)
    weight /= gain[None, :, None, None, None]


def write_half(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors in float16."""
    half = {name: value.half().contiguous() for name, value in state.items()}
    with atomic_path(path) as part:
        save_file(half, part, metadata=metadata)


def write_transformer(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Writes a transformer as scaled fp8 with the project's own guard, and counts the fp8 layers.

    Layers that the guard keeps wide are float16; tensors of one dimension are float32.
    """
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    written: dict[str, Tensor] = {}
    count = 0
    for name, value in state.items():
        quantised = value.ndim == 2 and not place_reason(name, len(blocks))
        if quantised:
            fp8, scale, reason = guarded_quantize(value.float(), name=name)
            if not reason:
                written[name] = fp8
                written[name.removesuffix("weight") + "scale_weight"] = scale
                count += 1
                continue
        written[name] = value.float() if value.ndim < 2 else value.half()
    with atomic_path(path) as part:
        save_file({name: value.contiguous() for name, value in written.items()}, part, metadata)
    return count


def export(run: Path, out: Path) -> None:
    """Writes both files of the preset.

    Args:
        run: folder with finished trainings.
        out: folder for the files; made if needed.

    Raises:
        FileNotFoundError: a training has not run.
    """
    kept = load_checkpoint(run / "dit.pt")
    if kept is None:
        raise FileNotFoundError(f"no trained transformer in {run}; run tools.tiny.train_dit")
    out.mkdir(parents=True, exist_ok=True)
    write_half(out / FILES["vae"].name, load_vae(run).state_dict(), LICENCE)
    steps = {"steps": str(kept["step"])}
    write_transformer(out / FILES["transformer"].name, kept["average"], LICENCE | steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.export", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    options = parser.parse_args(argv)
    export(options.run, options.out)
    for file in sorted(options.out.glob("*.safetensors")):
        sys.stdout.write(f"{file}  {file.stat().st_size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
