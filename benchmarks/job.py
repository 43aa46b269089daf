"""How long is a whole warm job, stage by stage, and how much memory does it take?

The real service, from the files of a job to its video, with networks of the published sizes and
random weights made on the device (`benchmarks/job_models.py`). One job before counts as the first
call; between jobs everything that the encoders and the pose stage made is forgotten, as if prompt,
picture and motion were new. A stage's seconds end when the device has done its work. Steps are
timed with events, so that the loop is not slowed down. With --card the memory plan is that of a
smaller card, and PyTorch may not take more than that. Writes one JSON file.

    python -m benchmarks.job --device cuda
    python -m benchmarks.job --device cuda --shape scail-17 --set kernels=eager
    python -m benchmarks.job --device cuda --card 18
    python -m benchmarks.job --tiny
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.job_models import Sizes, build, sizes_of, stand_ins
from benchmarks.job_motion import Motion, filmed_motion, saved_motion
from benchmarks.machine import RESULTS, card_state, environment, spread, write
from pipelines.loading import LoadOptions
from pipelines.memory import CONTEXT_BYTES
from pipelines.plan import memory_on
from pipelines.plan_shapes import sizes_of as plan_sizes
from xicon_infer import service_session
from xicon_infer.job import Job, make_job
from xicon_infer.media.write import write_png
from xicon_infer.service import run_job
from xicon_infer.service_session import Session
from xicon_infer.types import Result

GIB = 2**30
PROMPT = "a woman in a red coat dances in front of a plain grey wall, full body, soft light"

SHAPES: dict[str, dict[str, Any]] = {
    "scail-81": {"pipeline": "scail", "width": 416, "height": 672, "frames": 81, "steps": 6},
    "scail-17": {"pipeline": "scail", "width": 416, "height": 672, "frames": 17, "steps": 6},
    "dancer-81": {
        "pipeline": "steady_dancer", "width": 480, "height": 832, "frames": 81, "steps": 4,
    },
}  # fmt: skip
TINY = {"width": 128, "height": 160, "frames": 5, "steps": 2}

STAGES = {
    "read inputs": "read",
    "find poses": "pose",
    "draw pose": "draw_pose",
    "encode text": "text",
    "encode image": "clip",
    "encode reference and pose": "vae_encode",
    "project conditioning": "project",
    "sample": "sample",
    "decode video": "vae_decode",
    "write files": "mux",
}
"""Stages of the service by the names of the report; others keep theirs."""

EXTRAS: dict[str, dict[str, Any]] = {
    # The pose acts in every step: the floor of the target was computed so.
    "scail": {"pose_end": 1.0},
    "steady_dancer": {"guidance_scale": 1.0, "condition_guide_scale": 1.0, "pose_align": "off"},
}


@dataclass
class Watch:
    """A `Progress` that notes peaks of memory by stage, and when each step ended."""

    device: torch.device
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    marks: list[Any] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Notes the peak of what runs inside; the service resets it before and waits after."""
        if name == "sample":
            self.marks = [self._mark()]
        yield
        if self.device.type == "cuda":
            self.peaks[name] = {
                "allocated_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
            }

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Marks the end of a step of the sampling loop."""
        if unit == "step" and self.marks and len(self.marks) <= total:
            self.marks.append(self._mark())

    def warn(self, message: str) -> None:
        """Keeps the message."""
        self.warnings.append(message)

    def steps_s(self) -> list[float]:
        """Returns the seconds of each step."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [round(a.elapsed_time(b) / 1000, 5) for a, b in pairs]
        return [round(b - a, 5) for a, b in pairs]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    if args.device == "cpu":
        torch.set_num_threads(1)
    session = Session()
    sizes = sizes_of(SHAPES[args.shape[0]]["pipeline"], small=args.tiny)
    with stand_ins(sizes) as left_out, loading_random(args, sizes):
        for name in args.shape:
            with TemporaryDirectory() as folder:
                path = run_shape(name, args, session, Path(folder), left_out)
            print(f"written to {path}")


def run_shape(
    name: str, args: argparse.Namespace, session: Session, folder: Path, left_out: list[str]
) -> Path:
    """Runs the jobs of one shape and writes what they cost; returns the path of the result.

    Args:
        name: of the shape.
        args: the command line.
        session: keeps the networks from shape to shape.
        folder: for the files of the jobs.
        left_out: sentences about what has a stand-in.
    """
    shape = SHAPES[name] | (TINY if args.tiny else {})
    report = environment("benchmarks.job", args.device) | {"says": [*left_out], "shape": shape}
    path = args.out / file_name(name, args)
    motion = motion_of(args, folder, report)
    job = job_of(args, folder, motion, shape)
    report["job"] = told_options(job)
    for number in run_all(args, job, motion, report, session):
        write(report, path)
        print(f"{name}, job {number}: {report['runs'][-1]['total_s']:.3f} s")
    return path


def parse() -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--shape", nargs="+", default=["scail-81"], choices=SHAPES)
    parser.add_argument("--motion", default="saved", choices=("saved", "contract", "sized"))
    parser.add_argument("--rounds", type=int, default=2, help="jobs that count, after the first")
    parser.add_argument("--card", type=float, help="GiB of a smaller card to stay within")
    parser.add_argument("--matmul", default="scaled_mm_row", help="how fp8 weights multiply")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of the job"
    )
    parser.add_argument("--tag", default="", help="goes into the file name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("the published sizes need --device cuda; on a CPU run --tiny")
    if args.card is not None and args.device == "cpu":
        parser.error("--card needs --device cuda")
    if len({SHAPES[name]["pipeline"] for name in args.shape}) > 1:
        parser.error("--shape: all of one run must be of one pipeline, which is loaded once")
    return args


def file_name(name: str, args: argparse.Namespace) -> str:
    """Returns the name of the result of a shape."""
    words = ["job", name, args.device, *(["tiny"] if args.tiny else [])]
    words += [f"card{args.card:g}"] if args.card else []
    return "_".join([*words, *([args.tag] if args.tag else [])]) + ".json"


def motion_of(args: argparse.Namespace, folder: Path, report: dict[str, Any]) -> Motion:
    """Returns what drives the job; a film that cannot be made is told, and a motion taken."""
    motion = saved_motion()
    if args.motion != "saved":
        try:
            motion = filmed_motion(args, folder, report["shape"]["frames"])
        except ImportError as error:
            report["says"].append(f"the networks of --motion {args.motion} are not here: {error}")
    report["says"].append(motion.says)
    report["motion"] = motion.facts
    return motion


def job_of(args: argparse.Namespace, folder: Path, motion: Motion, shape: dict[str, Any]) -> Job:
    """Returns the job of a shape, with a picture to animate."""
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (shape["height"], shape["width"], 3), np.uint8)
    write_png(folder / "reference.png", picture)
    values = {
        "pipeline": shape["pipeline"],
        "preset": "tiny" if args.tiny else "fp8",
        "device": args.device,
        "image": folder / "reference.png",
        "prompt": PROMPT,
        "width": shape["width"],
        "height": shape["height"],
        "max_frames": shape["frames"],
        "num_inference_steps": shape["steps"],
        "seed": 0,
        "matmul": args.matmul,
        "loras": [],
        "sheet": False,
        "overwrite": True,
        "output": folder / "job.mp4",
        **EXTRAS[shape["pipeline"]],
        **motion.options,
        **dict(_pair(word) for word in args.set),
    }
    return make_job({name: _plain(value) for name, value in values.items()}, source="request")


def told_options(job: Job) -> dict[str, Any]:
    """Returns the options of the job that its cost may depend on: no paths and no prompts."""
    names = ("prompt", "negative_prompt", "image", "track", "video", "models_dir", "output")
    told = {name: value for name, value in job.settings().items() if name not in names}
    return {name: value for name, value in told.items() if isinstance(value, _JSON)}


@contextmanager
def loading_random(args: argparse.Namespace, sizes: Sizes) -> Iterator[None]:
    """Has the service load random weights inside, and plan for the card of the command line."""

    def made(name: str, _preset: str, options: LoadOptions) -> Any:
        pipeline = build(name, sizes, options)
        if args.device == "cuda":  # what drawing the weights took is not part of a job
            torch.cuda.empty_cache()
        return pipeline

    def planned(
        job: Job, _device: Any, shape: tuple[int, int, int], _recorder: Any, reserve: int = 0
    ) -> Any:
        free = int(args.card * GIB) - CONTEXT_BYTES - reserve
        return memory_on(job, plan_sizes(job, *shape), free_bytes=free)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(service_session, "build_pipeline", made))
        if args.card is not None:
            stack.enter_context(mock.patch.object(service_session, "memory_plan", planned))
            total = torch.cuda.get_device_properties(0).total_memory
            most = (args.card * GIB - CONTEXT_BYTES) / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, most))
        yield


def run_all(
    args: argparse.Namespace, job: Job, motion: Motion, report: dict[str, Any], session: Session
) -> Iterator[int]:
    """Runs the job several times; yields after each, when the report is worth keeping."""
    report["runs"] = []
    for number in range(args.rounds + 1):
        motion.before(job, session)
        forget(session)
        report["runs"].append(run_once(job, session, torch.device(args.device)))
        summarise(report)
        yield number


def forget(session: Session) -> None:
    """Throws away what encoders made of the last job, and memory that nothing uses."""
    if session._pipeline is not None:
        cache = session._pipeline.components.cache
        session._pipeline.components.cache = type(cache)()
    gc.collect()


def run_once(job: Job, session: Session, device: torch.device) -> dict[str, Any]:
    """Returns what one job cost."""
    watch = Watch(device)
    start = time.perf_counter()
    result = run_job(job, watch, session)
    total = time.perf_counter() - start
    stages: dict[str, Any] = {}
    for stage in result.stages:
        name = STAGES.get(stage.name, stage.name)
        seconds = stages.get(name, {}).get("seconds", 0.0) + stage.seconds
        stages[name] = {"seconds": round(seconds, 4), **watch.peaks.get(stage.name, {})}
    return {
        "total_s": round(total, 4),
        "stages": stages,
        "steps_s": watch.steps_s(),
        "peak_allocated_bytes": _most(stages, "allocated_bytes"),
        "peak_reserved_bytes": _most(stages, "reserved_bytes"),
        "warnings": watch.warnings,
        "used": used(result),
        "card": card_state() if device.type == "cuda" else None,
    }


def used(result: Result) -> dict[str, Any]:
    """Returns what the job ran with, as its report has it, and what it made."""
    left_out = ("components",)
    machine = {name: value for name, value in result.machine.items() if name not in left_out}
    return machine | {"frames": result.num_frames, "size": [result.width, result.height]}


def summarise(report: dict[str, Any]) -> None:
    """Brings the figures that follow from the runs up to date; the first one loads and warms."""
    first, *warm = report["runs"]
    report["first_job_s"] = first["total_s"]
    if not warm:
        return
    totals = [run["total_s"] for run in warm]
    report["total"] = spread(totals)
    middle = min(warm, key=lambda run: abs(run["total_s"] - statistics.median(totals)))
    report["stages"], report["steps_s"] = middle["stages"], middle["steps_s"]
    accounted = sum(stage["seconds"] for stage in middle["stages"].values())
    report["outside_stages_s"] = round(middle["total_s"] - accounted, 4)
    peaks = {name: [run[name] for run in warm] for name in _PEAKS}
    report |= {name: None if None in found else max(found) for name, found in peaks.items()}


_JSON = (str, int, float, bool)
_PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes")


def _most(stages: dict[str, Any], kind: str) -> int | None:
    found = [stage[kind] for stage in stages.values() if kind in stage]
    return max(found) if found else None


def _pair(word: str) -> tuple[str, Any]:
    """Returns name and value of "name=value"; numbers and true or false as JSON has them."""
    name, _, text = word.partition("=")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
