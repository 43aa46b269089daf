"""The pose networks of a job: loaded when they are first needed, and kept for the next job."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from pipelines.pose import PoseModelOptions, PoseModels, load_pose_models, model_paths
from xicon_infer.job import Job
from xicon_infer.runtime import Recorder, models_dirs

KeptModels: TypeAlias = "dict[Any, PoseModels]"
"""What was loaded from which files: at most one set, the last one."""


class LazyModels:
    """The pose networks of a job; a job whose poses are cached needs none.

    Args:
        job: says which.
        recorder: its device is theirs; told of the stage, and of licences in every job.
        kept: those of jobs before, used again where the same are wanted; None keeps nothing.
    """

    def __init__(self, job: Job, recorder: Recorder, kept: KeptModels | None = None) -> None:
        self.recorder = recorder
        self.kept = {} if kept is None else kept
        self.options = PoseModelOptions(
            job.body_network, job.detector, job.tracker, job.keypoint_model, job.keypoint_decode
        )
        self.search_dirs = tuple(models_dirs(job.models_dir))

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Returns network -> file."""
        return model_paths(self.options, self.search_dirs)

    @cached_property
    def loaded(self) -> PoseModels:
        """Returns the networks, loaded."""
        key = (self.options, str(self.recorder.device), tuple(sorted(self.paths.items())))
        # A tracker remembers the persons of its last video.
        if key not in self.kept or self.options.tracker != "none":
            self.kept.clear()
            with self.recorder.stage("load pose models"):
                self.kept[key] = load_pose_models(self.options, self.recorder.device, self.paths)
        models = self.kept[key]
        for note in models.notes:
            self.recorder.warn(note)
        return models
