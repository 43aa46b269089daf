"""How fast is a saved track drawn?

    python benchmarks/pose_render.py [--device cpu] [--threads 1] [--frames 64] [--repeats 3]

Draws the example dance in every mode at 512 x 896, a view so close that limbs fill the picture,
and two persons; prints frames per second and writes `results/pose_render_<device>.json` with the
machine, the versions and the commit. "capsules" is the 3-D part of "full" alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from xicon_infer.pose.camera import fit_affine, map_intrinsics  # noqa: E402
from xicon_infer.pose.cylinders import render_bodies  # noqa: E402
from xicon_infer.pose.render import RenderOptions, render_track  # noqa: E402
from xicon_infer.pose.track import load_tracks, resample_track  # noqa: E402
from xicon_infer.types import Track  # noqa: E402

WIDTH, HEIGHT = 512, 896


def main() -> None:
    """Measures every case and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    (track,) = load_tracks(ROOT / "examples" / "dance_fullbody.npz")
    track = resample_track(track, range(min(arguments.frames, len(track.body.joints))))
    frames = len(track.body.joints)
    results = []
    for name, draw in cases(track, arguments.device).items():
        seconds = measure(draw, arguments.repeats, arguments.device)
        mean, spread = statistics.mean(seconds), statistics.pstdev(seconds)
        results.append(
            {
                "case": name,
                "frames": frames,
                "seconds_mean": round(mean, 4),
                "seconds_spread": round(spread, 4),
                "frames_per_second": round(frames / mean, 1),
            }
        )
        print(f"{name:<16} {frames / mean:8.1f} frames/s")
    report = {**environment(arguments), "results": results}
    kind = torch.device(arguments.device).type
    path = ROOT / "benchmarks" / "results" / f"pose_render_{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


def cases(track: Track, device: str) -> dict[str, Callable[[], object]]:
    """Returns what is measured, by name."""

    def video(*tracks: Track, **options: Any) -> Callable[[], object]:
        return lambda: render_track(
            tracks, width=WIDTH, height=HEIGHT, options=RenderOptions(**options), device=device
        )

    camera = map_intrinsics(
        track.body.intrinsics, fit_affine(track.pose.size, (HEIGHT, WIDTH), "crop")
    )
    return {
        "capsules": lambda: render_bodies(
            track.body.joints[:, None], camera, height=HEIGHT, width=WIDTH, device=device
        ),
        "full": video(track, mode="full"),
        "full_then_half": video(track, mode="full_then_half"),
        "half": video(track, mode="half"),
        "close_up": video(nearer(track, 2400.0), mode="full_then_half"),
        "two_persons": video(track, nearer(track, -300.0), mode="full_then_half", persons=2),
    }


def nearer(track: Track, millimetres: float) -> Track:
    """Returns the track moved towards the camera."""
    joints = track.body.joints - np.array([0, 0, millimetres], np.float32)
    return replace(track, body=replace(track.body, joints=joints))


def measure(draw: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Returns seconds of each repeat, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        draw()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def environment(arguments: argparse.Namespace) -> dict[str, object]:
    """Returns where and with what the numbers were taken."""
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    return {
        "command": "python " + " ".join(["benchmarks/pose_render.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": arguments.threads,
        # Other work on the machine makes the numbers too small; this tells how much there was.
        "load_average": round(os.getloadavg()[0], 1),
        "size": [WIDTH, HEIGHT],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
    }


def commit() -> str:
    """Returns the commit of the working tree, marked if it has changes; "none" without one."""

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return "none"
    return f"{head} with changes" if git("--no-optional-locks", "status", "--porcelain") else head


def processor() -> str:
    """Returns the name of the CPU and how many of its cores are usable."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or 'unknown'} cores"


if __name__ == "__main__":
    main()
