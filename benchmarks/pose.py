"""Times the pose stage: each of its parts alone, and the whole chain overlapped or in turn.

    python -m benchmarks.pose --folder /tmp/pose --networks contract --frames 64
    python -m benchmarks.pose --folder /tmp/pose --networks sized --frames 6 --batch 2
    python -m benchmarks.pose --folder /tmp/pose --networks sized --device cuda --frames 192

"contract" are the small networks of tests/golden/scail_pose: what is left is our own work around
them. "sized" are networks of the published sizes with random weights, made here. Their answers mean
nothing, so each runs in full and then what the contract network saw is passed on. Candidates run in
turns (A B C A B C ...), so that a machine that slows down slows all of them down.

"renderer" counts, it does not time: capsule tests of our renderer against the distance evaluations
that tracing the same rays step by step takes, by the constants of the specification.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.pose_networks import CONTRACT, SIZES, network_paths
from benchmarks.pose_render import commit, processor
from pipelines import pose
from pipelines.pose import MotionOptions, PoseModelOptions, PoseModels
from tests.pose_films import dance, draw, film
from xicon_infer.media.video import iter_frames
from xicon_infer.pose import cylinders
from xicon_infer.pose.align import Alignment
from xicon_infer.pose.camera import default_intrinsics, fit_affine, map_intrinsics
from xicon_infer.pose.observations import Bodies, Boxes, Observation
from xicon_infer.pose.render import render_track
from xicon_infer.types import Float32Array, SilentProgress, Track, UInt8Array

ROOT = Path(__file__).resolve().parents[1]
CANVAS = (896, 512)
FPS = 24
# What the specification says of the reference renderer: how it walks along a ray.
FIRST_MM, HIT_MM, LEAST_STEP_MM, MOST_STEPS = 0.1, 1e-3, 1e-4, 300
# Every fourth pixel both ways: rays do not depend on each other.
STRIDE = 4
# Additions, multiplications, divisions, roots, comparisons, each as one. A distance to one capsule:
# offset 3, dot 5, scale and clamp 3, closest point 6, length 6, radius and minimum 2. A test of one
# capsule, read off `cylinders._rays` and `_intersect`: ray 13, centre 11, projections 22, side 29,
# two caps 60, depth 5.
FLOP_PER_DISTANCE, FLOP_PER_TEST = 25, 140


@dataclass(frozen=True)
class Film:
    """A driving video and what the contract networks see in it; frames uint8 [F, H, W, 3]."""

    path: Path
    frames: UInt8Array
    seen: list[Observation]
    character: UInt8Array


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    torch.manual_seed(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    report = describe(args)
    driving = make_film(args, device)
    paths, report["networks"] = network_paths(args)
    models = load_models(paths, device)
    with mock.patch.object(pose, "BATCH", args.batch):
        found, report["alignment"] = candidates(driving, models, args)
        report["frames_per_second"] = measure(found, args)
    report["overlap"] = overlap(report["frames_per_second"])
    report["renderer"] = [count_work(driving, size) for size in (CANVAS, (448, 256))]
    report["load_average_at_end"] = round(os.getloadavg()[0], 1)
    name = f"pose_{args.networks}_{args.threads}threads_{device.type}.json"
    path = args.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"written to {path}")


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for films and exported files")
    parser.add_argument("--networks", choices=("contract", "sized"), default="contract")
    parser.add_argument("--keypoint-size", choices=tuple(SIZES), default="h", help="of ViTPose")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--frames", type=int, default=64, help="2 to 200")
    parser.add_argument("--batch", type=int, default=pose.BATCH, help="frames per batch")
    parser.add_argument("--height", type=int, default=1280, help="of the film, pixels")
    parser.add_argument("--width", type=int, default=720, help="of the film, pixels")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each candidate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each network")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if not 2 <= args.frames <= 200:
        parser.error(f"--frames is {args.frames}; 2 to 200 are allowed")
    return args


def make_film(args: argparse.Namespace, device: torch.device) -> Film:
    """Returns the dance as a film, lossless so that the contract networks can read it."""
    size = (args.height, args.width)
    person = dance(args.frames, FPS)
    path = film(args.folder / "film.mkv", [person], size=size, fps=FPS)
    frames = np.stack(list(iter_frames(path)))
    contract = load_models(CONTRACT, device)
    seen = pose.observe(frames, contract, SilentProgress(), len(frames))
    # Another character: smaller, and lower in the picture.
    points = (person[0] * 0.8 + (0.1, 0.15)) * (CANVAS[1], CANVAS[0])
    return Film(path, frames, seen, draw(CANVAS, [points]))


def load_models(paths: dict[str, Path], device: torch.device) -> PoseModels:
    """Returns the networks."""
    options = PoseModelOptions()
    named = {**paths, options.keypoint_model: paths["vitpose"]}
    return pose.load_pose_models(options, device, named)


def replaying(models: PoseModels, seen: list[Observation]) -> PoseModels:
    """Returns networks that run in full and then answer what was seen in the film."""
    boxes, points, bodies = iter(seen), iter(seen), iter(seen)

    def detect(frames: UInt8Array) -> list[Boxes]:
        models.detector.detect(frames)
        return [next(boxes).boxes for _ in frames]

    def keypoints(
        frames: UInt8Array, frame_index: list[int], bboxes: Float32Array
    ) -> tuple[Float32Array, Float32Array]:
        models.keypoints.estimate(frames, frame_index, bboxes)
        part = [next(points) for _ in frames]
        return (
            np.concatenate([each.keypoints for each in part]),
            np.concatenate([each.keypoint_scores for each in part]),
        )

    def estimate(
        frames: UInt8Array, boxes: list[Boxes], intrinsics: Float32Array | None
    ) -> list[Bodies]:
        models.bodies.estimate(frames, boxes, intrinsics)
        return [next(bodies).bodies for _ in frames]

    parts: list[Any] = [
        SimpleNamespace(detect=detect),
        SimpleNamespace(estimate=keypoints),
        SimpleNamespace(estimate=estimate),
    ]
    return PoseModels(*parts)


def candidates(
    driving: Film, models: PoseModels, args: argparse.Namespace
) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Returns what is timed, by name, and how the tracks were fitted to the character."""
    frames, seen = driving.frames, driving.seen
    size = (frames.shape[1], frames.shape[2])
    camera = default_intrinsics(*size).astype(np.float32)
    parts = [slice(start, start + args.batch) for start in range(0, len(frames), args.batch)]
    contract = load_models(CONTRACT, torch.device(args.device))
    reference = pose.find_reference(driving.character, contract)
    options = MotionOptions()

    def follow() -> list[Track]:
        return pose.find_tracks(seen, fps=Fraction(FPS), size=size, options=options)[0]

    def fit(tracks: list[Track]) -> tuple[list[Track], Alignment]:
        return pose.align(tracks, reference, size=CANVAS, fit="crop", options=options)

    def keypoints() -> None:
        for part in parts:
            boxes = [each.boxes.bboxes for each in seen[part]]
            index = [i for i, found in enumerate(boxes) for _ in found]
            models.keypoints.estimate(frames[part], index, np.concatenate(boxes))

    def bodies() -> None:
        for part in parts:
            models.bodies.estimate(frames[part], [each.boxes for each in seen[part]], camera)

    def chain() -> list[Observation]:
        networks = replaying(models, seen)
        return pose.observe(iter_frames(driving.path), networks, SilentProgress(), len(frames))

    def in_turn() -> list[Observation]:
        # The same code: without its thread, every stage waits for the one after it.
        with mock.patch.object(pose, "ahead", iter):
            return chain()

    tracks = follow()
    fitted, alignment = fit(tracks)
    height, width = CANVAS
    return {
        "decode": lambda: sum(1 for _ in iter_frames(driving.path)),
        "detect": lambda: [models.detector.detect(frames[part]) for part in parts],
        "keypoints": keypoints,
        "bodies": bodies,
        "chain, overlapped": chain,
        "chain, one after the other": in_turn,
        "follow": follow,
        "align": lambda: fit(tracks),
        "follow and align": lambda: fit(follow()),
        "render": lambda: render_track(fitted, width=width, height=height, device=args.device),
    }, {"mode": alignment.mode, "reason": alignment.reason}


def measure(found: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, Any]:
    """Returns frames per second and processor time of each candidate.

    Wall time, because stages that overlap spend the same processor time; on a machine with other
    work the processor time tells how much of it was ours.
    """
    first: dict[str, float] = {}
    wall: dict[str, list[float]] = {name: [] for name in found}
    processor_s: dict[str, list[float]] = {name: [] for name in found}
    for number in range(args.rounds + 1):
        for name, run in found.items():
            # The networks are warm by then, and a chain of large ones takes minutes.
            if number == 0 and name.startswith("chain") and args.networks == "sized":
                continue
            start, used = time.perf_counter(), time.process_time()
            run()
            elapsed, used = time.perf_counter() - start, time.process_time() - used
            if number == 0:
                first[name] = round(elapsed, 4)
            else:
                wall[name].append(elapsed)
                processor_s[name].append(used)
    return {
        name: {
            "median": round(args.frames / statistics.median(values), 3),
            "least": round(args.frames / max(values), 3),
            "most": round(args.frames / min(values), 3),
            "processor_s_per_frame": round(statistics.median(processor_s[name]) / args.frames, 5),
            "first_call_s": first.get(name),
        }
        for name, values in wall.items()
    }


def overlap(speeds: dict[str, Any]) -> dict[str, float]:
    """Returns what overlapping gains, and the most that it could: the slowest stage alone."""
    alone = [speeds[name]["median"] for name in ("decode", "detect", "keypoints", "bodies")]
    chain, turns = (
        speeds[name]["median"] for name in ("chain, overlapped", "chain, one after the other")
    )
    return {
        "speed_up": round(chain / turns, 3),
        "speed_up_if_only_the_slowest_counted": round(sum(1 / v for v in alone) * min(alone), 3),
    }


def count_work(driving: Film, size: tuple[int, int]) -> dict[str, Any]:
    """Returns the work of drawing the middle frame at (H, W): ours, and of tracing its rays.

    Rays that a tracer sends into empty space count too: it has one for every pixel. Finding the
    normals by differences, which ours needs not, is left out.
    """
    height, width = size
    middle = driving.seen[len(driving.seen) // 2]
    joints = middle.bodies.joints[None, :1]
    affine = fit_affine((driving.frames.shape[1], driving.frames.shape[2]), size, "crop")
    camera = default_intrinsics(*driving.frames.shape[1:3])
    intrinsics = map_intrinsics(camera, affine)
    tester = cylinders._intersect
    with mock.patch.object(cylinders, "_intersect", wraps=tester) as spy:
        picture = cylinders.render_bodies(joints, intrinsics, height=height, width=width)
    tests = sum(len(call.args[2]) for call in spy.call_args_list)
    lens = (intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2])
    row, column = torch.meshgrid(
        torch.arange(0, height, STRIDE), torch.arange(0, width, STRIDE), indexing="ij"
    )
    steps, hit = trace(joints, cylinders._rays(row.flatten(), column.flatten(), lens))
    capsules = int(cylinders.build_capsules(joints).present.sum())
    distances = float(steps.double().mean()) * capsules
    ours = tests / (height * width)
    outline = torch.from_numpy(picture[0, ::STRIDE, ::STRIDE, 3] > 0).flatten()
    return {
        "height": height,
        "width": width,
        "capsules": capsules,
        "covered": round(float(outline.float().mean()), 4),
        "outline_differs_on_traced_pixels": int((outline != hit).sum()),
        "traced_pixels": len(hit),
        "steps_per_pixel": {
            "mean": round(float(steps.double().mean()), 2),
            "most": int(steps.max()),
            "on_the_body": round(float(steps[hit].double().mean()), 2),
        },
        "distance_evaluations_per_pixel": round(distances, 1),
        "capsule_tests_per_pixel": round(ours, 3),
        "times_fewer_evaluations": round(distances / ours, 1),
        "reference_mflop": round(distances * FLOP_PER_DISTANCE * height * width / 1e6, 1),
        "our_mflop": round(tests * FLOP_PER_TEST / 1e6, 1),
    }


def trace(joints: Float32Array, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Returns steps int64 [N] that rays [N, 3] take through the distance field, and who hits.

    Args:
        joints: [1, P, 24, 3] millimetres.
        ray: unit directions.
    """
    capsules = cylinders.build_capsules(joints)
    start = torch.from_numpy(capsules.start[capsules.present]).double()
    along = torch.from_numpy(capsules.end[capsules.present]).double() - start
    squared = (along * along).sum(1)
    depths = cylinders.depth_range(joints)
    assert depths is not None
    near, far = cylinders._FAR_MM
    limit = max(min(depths[1], far), near)
    steps = torch.zeros(len(ray), dtype=torch.int64)
    hit = torch.zeros(len(ray), dtype=torch.bool)
    depth = torch.full((len(ray),), FIRST_MM, dtype=torch.float64)
    walking = torch.arange(len(ray))
    for _ in range(MOST_STEPS):
        offset = (depth[walking, None] * ray[walking].double())[:, None] - start
        share = ((offset * along).sum(2) / squared).clamp(0, 1)
        distance = (offset - share[..., None] * along).norm(dim=2).amin(1) - cylinders.RADIUS_MM
        steps[walking] += 1
        hit[walking] = distance < HIT_MM
        depth[walking] += distance.clamp_min(LEAST_STEP_MM)
        walking = walking[(distance >= HIT_MM) & (depth[walking] <= limit)]
    return steps, hit


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what is needed to repeat the run: command, machine, versions, commit."""
    cuda = torch.device(args.device).type == "cuda"
    packages = ("numpy", "onnxruntime-gpu", "onnx", "ultralytics", "torchvision", "av")
    return {
        "command": shlex.join(["python", "-m", "benchmarks.pose", *sys.argv[1:]]),
        "commit": commit(),
        "machine": torch.cuda.get_device_name() if cuda else processor(),
        "threads": args.threads,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        # Other work on the machine makes the numbers too small; this tells how much there was.
        "load_average": round(os.getloadavg()[0], 1),
        "film": {
            "frames": args.frames,
            "size": [args.height, args.width],
            "codec": "ffv1, flat background, one person",
        },
        "canvas": list(CANVAS),
        "batch": args.batch,
        "rounds": args.rounds,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
            **{name: version(name) for name in packages},
        },
    }


if __name__ == "__main__":
    main()
