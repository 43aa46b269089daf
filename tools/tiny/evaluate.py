"""Measures the tiny SCAIL model on characters and motions that it never saw.

    python -m tools.tiny.evaluate --out benchmarks/results/tiny.json

Everything runs through the true pipeline: track in, pose drawn, encoded, sampled, decoded. Each
figure stands beside what it would be if the model ignored that input.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import environment
from pipelines.frames import decode_frames, encode_frames
from pipelines.loading import LoadOptions, load_tiny
from pipelines.scail import ScailOptions, ScailPipeline
from pipelines.tiny_trained import LORA
from tools.tiny.measure import flicker_ratio, identity_error, pose_agreement, psnr, seam
from tools.tiny.train_vae import HEIGHT, WIDTH
from tools.tiny.world import Clip, make_clip
from xicon_infer.console import ConsoleProgress
from xicon_infer.media.write import atomic_path
from xicon_infer.sampling.windows import ContextOptions, weighted_windows
from xicon_infer.types import Progress, SilentProgress, Track, UInt8Array, latent_frames

SHORT_FRAMES, LONG_FRAMES = 17, 121
WINDOWS = ContextOptions(schedule="static_standard", frames=49, overlap=16)
FINE = 0.05
"""The stricter distance of PCK, as a share of the figure's height."""
FIRST_SEED = 5000
"""Test clips of lower numbers were looked at during development."""


def held_out_clip(
    index: int, num_frames: int = SHORT_FRAMES, *, height: int = HEIGHT, width: int = WIDTH
) -> Clip:
    """Returns a clip of the held-out split."""
    seed = FIRST_SEED + index
    return make_clip(seed, split="test", num_frames=num_frames, height=height, width=width)


def generate(
    pipeline: ScailPipeline,
    clip: Clip,
    *,
    reference: UInt8Array | None = None,
    track: Track | None = None,
    **changes: Any,
) -> UInt8Array:
    """Returns the video [F, H, W, 3] that the pipeline makes of a clip's reference and track.

    Args:
        pipeline: of the tiny preset.
        clip: the truth.
        reference: another picture in place of the clip's.
        track: another motion in place of the clip's.
        changes: fields of `ScailOptions`.
    """
    _, height, width, _ = clip.frames.shape
    chosen: dict[str, Any] = {
        "prompt": clip.prompt,
        "width": width,
        "height": height,
        "num_frames": len(clip.frames),
        "pose_end": 1.0,
        "seed": 1,
    }
    options = ScailOptions(**(chosen | changes))
    picture = clip.reference if reference is None else reference
    return pipeline(picture, [track or clip.track], options).clip.frames


def measure_vae(pipeline: ScailPipeline, clips: Sequence[Clip]) -> dict[str, float]:
    """Returns the PSNR, dB, of clips that go through encoder and decoder alone."""
    found, quiet = [], SilentProgress()
    with torch.inference_mode():
        for clip in clips:
            vae = pipeline.components.vae
            latents = encode_frames(vae, clip.frames, quiet)
            frames = decode_frames(vae, latents, tiles=None, looped=False, progress=quiet)
            found.append(psnr(frames, clip.frames))
    return {"vae_psnr_db": float(np.mean(found)), "vae_psnr_worst_db": float(min(found))}


def judge(frames: UInt8Array, clip: Clip) -> dict[str, float]:
    """Returns the main figures of a video of the clip, and what its still reference would get."""
    still = np.repeat(clip.reference[None], len(clip.frames), axis=0)
    return {
        "pck": pose_agreement(frames, clip),
        "pck_still_reference": pose_agreement(still, clip),
        "pck_fine": pose_agreement(frames, clip, FINE),
        "pck_fine_still_reference": pose_agreement(still, clip, FINE),
        "identity_error": identity_error(frames, clip),
        "flicker_ratio": flicker_ratio(frames, clip.frames),
        "psnr_db": psnr(frames, clip.frames),
    }


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each figure over the clips."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def measure_short(
    pipeline: ScailPipeline, clips: Sequence[Clip], progress: Progress
) -> dict[str, float]:
    """Returns how short videos follow the pose and keep the character, and what ignoring gives.

    `other` is the next clip: its track as the wrong pose, its reference as the wrong character.
    """
    rows: list[dict[str, float]] = []
    for index, clip in enumerate(clips):
        other = clips[(index + 1) % len(clips)]
        without_pose = generate(pipeline, clip, pose_strength=0.0)
        half_pose = generate(pipeline, clip, pose_end=0.5)
        wrong_pose = generate(pipeline, clip, track=other.track)
        wrong_character = generate(pipeline, clip, reference=other.reference)
        rows.append(
            judge(generate(pipeline, clip), clip)
            | {
                "pck_truth": pose_agreement(clip.frames, clip),
                "pck_fine_truth": pose_agreement(clip.frames, clip, FINE),
                "pck_default_pose_end": pose_agreement(half_pose, clip),
                "pck_without_pose": pose_agreement(without_pose, clip),
                "pck_wrong_pose": pose_agreement(wrong_pose, clip),
                "identity_error_truth": identity_error(clip.frames, clip),
                "identity_error_shuffled": identity_error(wrong_character, clip),
            }
        )
        progress.step(index + 1, len(clips), "clip")
    return means(rows)


def measure_large(
    pipeline: ScailPipeline, clips: Sequence[Clip], progress: Progress
) -> dict[str, float]:
    """Returns the main figures for clips of the size and length of the demo's windows."""
    rows = []
    for index, clip in enumerate(clips):
        rows.append(judge(generate(pipeline, clip), clip))
        progress.step(index + 1, len(clips), "clip")
    return {f"large_{name}": value for name, value in means(rows).items()}


def measure_long(
    pipeline: ScailPipeline, clips: Sequence[Clip], progress: Progress
) -> dict[str, float]:
    """Returns how videos of several context windows keep the character, and whether seams show."""
    rows: list[dict[str, float]] = []
    for index, clip in enumerate(clips):
        frames = generate(pipeline, clip, context=WINDOWS)
        size, borders = WINDOWS.frames, window_borders(len(clip.frames))
        rows.append(
            {
                "long_pck": pose_agreement(frames, clip),
                "long_identity_error_first": identity_error(frames[:size], cut(clip, 0, size)),
                "long_identity_error_last": identity_error(
                    frames[-size:], cut(clip, len(frames) - size, len(frames))
                ),
                "long_seam": seam(frames, borders),
                "long_seam_truth": seam(clip.frames, borders),
                "long_flicker_ratio": flicker_ratio(frames, clip.frames),
            }
        )
        progress.step(index + 1, len(clips), "clip")
    return means(rows)


def window_borders(num_frames: int) -> list[int]:
    """Returns the pixel frames at which a window of `WINDOWS` begins or the one before ends."""
    found = set()
    total = latent_frames(num_frames)
    for window in weighted_windows(WINDOWS, 0, total)[0]:
        for latent in (window[0], window[-1] + 1):
            if 0 < latent < total:
                found.add(4 * latent - 3)
    return sorted(found)


def cut(clip: Clip, start: int, end: int) -> Clip:
    """Returns the frames [start, end) of a clip; its track stays whole."""
    return Clip(
        frames=clip.frames[start:end],
        pose=clip.pose[start:end],
        reference=clip.reference,
        track=clip.track,
        points=clip.points[start:end],
        visible=clip.visible[start:end],
        colours=clip.colours,
        prompt=clip.prompt,
    )


def measure_storage(clips: Sequence[Clip]) -> dict[str, float]:
    """Returns how far other ways to store and multiply move the pictures, levels (of 255)."""
    exact = ScailPipeline(load_tiny("scail"))
    wanted = [generate(exact, clip).astype(float) for clip in clips]
    found = {}
    for name, options in {
        "bf16": LoadOptions(dtype=torch.bfloat16),
        "fp8_matmul": LoadOptions(storage="merged-fp8", matmul="scaled_mm_row"),
    }.items():
        pipeline = ScailPipeline(load_tiny("scail", options))
        errors = [
            float(np.abs(generate(pipeline, clip) - frames).mean())
            for clip, frames in zip(clips, wanted, strict=True)
        ]
        found[f"drift_{name}_levels"] = float(np.mean(errors))
    return found


def measure_lora(clips: Sequence[Clip]) -> dict[str, float]:
    """Returns how colourful videos are without, with half and with all of the grey LoRA.

    Also how far the LoRA merged into the weights (fp8 again afterwards, and bf16) is from the one
    that runs beside them, levels (of 255).
    """
    kinds: dict[str, LoadOptions] = {
        "without": LoadOptions(),
        "half": LoadOptions(loras=((str(LORA), 0.5),)),
        "beside": LoadOptions(loras=((str(LORA), 1.0),)),
        "merged": LoadOptions(loras=((str(LORA), 1.0),), lora_mode="merge"),
        "merged_bf16": LoadOptions(loras=((str(LORA), 1.0),), storage="merged-bf16"),
    }
    videos = {}
    for name, options in kinds.items():
        pipeline = ScailPipeline(load_tiny("scail", options))
        videos[name] = [generate(pipeline, clip).astype(float) for clip in clips]
    found = {
        f"saturation_{name}": float(np.mean([np.ptp(v, axis=-1).mean() for v in videos[name]]))
        for name in ("without", "half", "beside", "merged")
    }
    for name in ("merged", "merged_bf16"):
        pairs = zip(videos[name], videos["beside"], strict=True)
        found[f"drift_lora_{name}_levels"] = float(
            np.mean([np.abs(a - b).mean() for a, b in pairs])
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.evaluate", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--clips", type=int, default=24, help="short clips")
    parser.add_argument("--large-clips", type=int, default=24, help="clips of 128x224x49")
    parser.add_argument("--long-clips", type=int, default=4, help="clips of 121 frames")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    progress = ConsoleProgress()
    pipeline = ScailPipeline(load_tiny("scail"))
    short = [held_out_clip(i) for i in range(options.clips)]
    figures = measure_vae(pipeline, short)
    with progress.stage("short videos"):
        figures |= measure_short(pipeline, short, progress)
    with progress.stage("large videos"):
        large = [held_out_clip(i, 49, height=224, width=128) for i in range(options.large_clips)]
        figures |= measure_large(pipeline, large, progress)
    with progress.stage("long videos"):
        long = [held_out_clip(i, LONG_FRAMES) for i in range(options.long_clips)]
        figures |= measure_long(pipeline, long, progress)
    with progress.stage("storage"):
        figures |= measure_storage(short[:4]) | measure_lora(short[:4])
    result = environment("tools.tiny.evaluate", "cpu") | {
        "question": "Does the tiny model dance, and as whom?",
        "clips": {
            f"short, {WIDTH}x{HEIGHT}x{SHORT_FRAMES}": options.clips,
            "large, 128x224x49": options.large_clips,
            f"long, {WIDTH}x{HEIGHT}x{LONG_FRAMES}": options.long_clips,
        },
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }
    with atomic_path(options.out) as part:
        part.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
