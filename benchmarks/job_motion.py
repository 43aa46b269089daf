"""The motion of `benchmarks.job`: a saved one, or a film that pose networks really look at.

Networks of the published sizes answer nonsense, so each runs in full and then what the small
contract networks saw in the film is passed on, as in `benchmarks.pose`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT
from xicon_infer.job import Job
from xicon_infer.runtime import Recorder
from xicon_infer.service_pose_models import LazyModels
from xicon_infer.service_session import Session
from xicon_infer.types import SilentProgress

DANCE = ROOT / "examples" / "dance_fullbody.npz"
FILM_SIZE = (1280, 720)
SMALL_FILM_SIZE = (320, 192)


@dataclass(frozen=True)
class Motion:
    """What a job is driven by.

    options: of the job. says: what it stands for. before: to be called before each run. facts: for
    the report.
    """

    options: dict[str, Any]
    says: str
    before: Callable[[Job, Session], None]
    facts: dict[str, Any]


def saved_motion() -> Motion:
    """Returns the example dance, as `--track` takes it: no networks, no driving video."""
    says = "pose: a saved motion is drawn; no video is read and no pose network runs"
    return Motion({"track": DANCE}, says, lambda job, session: None, {})


def filmed_motion(args: argparse.Namespace, folder: Path, frames: int) -> Motion:
    """Returns a film of the dance and networks for it.

    Args:
        args: the command line of `benchmarks.job`: motion ("sized" or "contract"), device, tiny.
        folder: for the film and the files of the networks.
        frames: of the film.
    """
    # Imported here: they need onnxruntime, which not every machine has.
    from benchmarks import pose as pose_benchmark
    from benchmarks.pose_networks import network_paths
    from tests.pose_films import contract_models
    from xicon_infer.media.video import iter_frames

    device = torch.device(args.device)
    height, width = SMALL_FILM_SIZE if args.tiny else FILM_SIZE
    told = argparse.Namespace(
        folder=folder, networks=args.motion, keypoint_size="h", device=args.device,
        frames=frames, height=height, width=width,
    )  # fmt: skip
    film = pose_benchmark.make_film(told, device)
    paths, facts = network_paths(told)
    models = pose_benchmark.load_models(paths, device)
    names = contract_models(folder / "names")
    start = time.perf_counter()
    count = sum(1 for _ in iter_frames(film.path))
    facts = {"networks": facts, "decode_video_alone_s": round(time.perf_counter() - start, 4)}

    def before(job: Job, session: Session) -> None:
        lazy = LazyModels(job, Recorder(SilentProgress(), device), {})
        key = (lazy.options, str(device), tuple(sorted(lazy.paths.items())))
        session.pose_models.clear()
        session.pose_models[key] = pose_benchmark.replaying(models, film.seen)

    says = (
        f"pose: a film of {count} frames at {width}x{height}, {args.motion} networks on every "
        "frame; their answers are replaced, and the motion is not fitted to the character"
    )
    options = {"video": film.path, "models_dir": names, "align": "off", "pose_cache": False}
    return Motion(options, says, before, facts)
